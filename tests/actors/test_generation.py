"""Real vLLM on CPU: drawing, determinism, versions."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from rlhf.errors import DataError, EngineError
from rlhf.sampling import SamplingConfig
from tests.actors.vllm.engines import RunningWorker, draw, make_prompts, texts_and_bits

pytestmark = pytest.mark.engine


def test_groups_carry_what_was_drawn(generation: RunningWorker):
    prompts = make_prompts()
    groups = generation.generate()
    assert [group.uid for group in groups] == [prompt.uid for prompt in prompts]
    for prompt, group in zip(prompts, groups, strict=True):
        payload = group.payload
        assert payload.prompt == prompt
        assert group.prompt_length == len(prompt.token_ids)
        assert group.weight_versions == (generation.version, generation.version)
        assert group.completion_lengths == tuple(len(r.completion.token_ids) for r in payload.rollouts)
        for rollout in payload.rollouts:
            completion = rollout.completion
            assert completion.token_ids.dtype == np.int32
            assert completion.log_probs.dtype == np.float32
            assert completion.log_probs.shape == completion.token_ids.shape
            assert (completion.log_probs <= 0).all()
            span = completion.version_spans[0]
            assert (span.version, span.start, span.end) == (generation.version, 0, len(completion.token_ids))
            ended = completion.token_ids[-1] == 2  # <|im_end|>
            assert completion.finish_reason == ("stop" if ended else "length")
            assert len(completion.token_ids) == 24 or ended
    assert len({bits for _, bits, _ in texts_and_bits(groups)}) == 16, "siblings have seeds of their own"


def test_the_same_batch_on_the_same_weights_gives_the_same_bits(generation: RunningWorker):
    version = generation.version
    first = texts_and_bits(generation.generate(version=version))
    assert texts_and_bits(generation.generate(version=version)) == first
    generation.run(draw(generation.worker, make_prompts(1), 3, version))  # leaves a prefix in the cache
    assert texts_and_bits(generation.generate(version=version)) == first
    generation.reset()
    assert texts_and_bits(generation.generate(version=version)) == first


def test_a_prompt_drawn_alone_draws_the_same_tokens(generation: RunningWorker):
    """A redispatch by uid repeats the seed, so in fp32 it nearly always repeats the tokens."""
    prompts = make_prompts()
    whole = generation.generate()
    alone = generation.run(draw(generation.worker, prompts[2:3], 4, generation.version))
    for together, single in zip(whole[2].payload.rollouts, alone[0].payload.rollouts, strict=True):
        np.testing.assert_array_equal(together.completion.token_ids, single.completion.token_ids)
        np.testing.assert_allclose(together.completion.log_probs, single.completion.log_probs, atol=1e-4)


def test_log_probs_are_those_of_the_model_at_the_sampling_temperature(generation: RunningWorker, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(generation.model, dtype=torch.float32)
    sampling = SamplingConfig(max_tokens=16, temperature=0.7, ignore_eos=True)
    monkeypatch.setattr(generation.worker, "_sampling", sampling)
    for group in generation.run(draw(generation.worker, make_prompts(2), 2, 0)):
        prompt_ids = list(group.payload.prompt.token_ids)
        for rollout in group.payload.rollouts:
            answer = torch.from_numpy(rollout.completion.token_ids.astype(np.int64))
            assert len(answer) == 16
            with torch.no_grad():
                logits = model(torch.tensor([prompt_ids + answer.tolist()])).logits[0, len(prompt_ids) - 1 : -1]
            expected = torch.log_softmax(logits / 0.7, dim=-1).gather(1, answer[:, None])[:, 0]
            np.testing.assert_allclose(rollout.completion.log_probs, expected.numpy(), atol=1e-4)


def test_older_weights_than_asked_for_are_refused(generation: RunningWorker):
    with pytest.raises(EngineError, match=f"version {generation.version}.*version {generation.version + 1}"):
        generation.generate(version=generation.version + 1)
    assert generation.generate(version=generation.version - 1)


def test_newer_weights_than_asked_for_are_refused_where_no_others_will_do(generation: RunningWorker):
    prompts = make_prompts(1)
    assert generation.run(draw(generation.worker, prompts, 1, generation.version, exact=True))
    with pytest.raises(EngineError, match=f"version {generation.version}.*version {generation.version - 1}"):
        generation.run(draw(generation.worker, prompts, 1, generation.version - 1, exact=True))


def test_a_prompt_without_room_is_refused_by_its_uid(generation: RunningWorker):
    long = dataclasses.replace(make_prompts(1)[0], token_ids=tuple([7] * 240))
    with pytest.raises(DataError, match="test/0.*240 tokens"):
        generation.run(draw(generation.worker, [long], 1, 0))


def test_a_caller_that_leaves_takes_its_requests_along(generation: RunningWorker):
    async def leave():
        call = asyncio.ensure_future(draw(generation.worker, make_prompts(), 4, 0))
        while not generation.engine.num_in_flight:  # admission pauses the engine: none can end unseen
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        return generation.engine.num_in_flight

    assert generation.run(leave()) == 0
    assert generation.generate()
