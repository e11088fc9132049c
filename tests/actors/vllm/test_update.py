"""Real vLLM on CPU: weights arrive whole and bit-equal, or nothing is served."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from actors.ranks import RankInfo
from actors.vllm.config import EngineConfig
from rlhf.errors import EngineError, PublicationError, ValueLostError
from rlhf.sampling import SamplingConfig
from rlhf.weights import Bucket, combine_digests, make_bucket
from tests.actors.engine_ranks import run_ranks
from tests.actors.vllm.engines import (
    RunningWorker,
    draw,
    make_buckets,
    make_prompts,
    texts_and_bits,
    weights_of,
)
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """Another seed's weights, exported to a folder."""
    return build_tiny_model(tmp_path_factory.mktemp("other"), seed=5)


def _hash(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def learn(info: RankInfo, model: Path, folder: Path) -> list[Bucket]:
    from tests.actors import learner_work as work

    return work.learned_with_adapter(info, model, folder)


def merged_by_peft(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The start model in bf16 with PEFT's own merge of an adapter, in fp32, cast to bf16 at the end."""
    start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).float()
    merged = PeftModel.from_pretrained(start, adapter).merge_and_unload()
    return {name: tensor.detach().bfloat16() for name, tensor in merged.named_parameters()}


def test_a_learner_s_weights_act_bit_for_bit_like_a_fresh_engine_on_its_export(generation: RunningWorker, tmp_path):
    """From DeepSpeed over its buckets to the engine: tied embeddings once, an adapter merged."""
    folder = tmp_path / "export"
    [buckets] = run_ranks(1, learn, generation.model, folder)
    assert len(buckets) >= 3
    old = texts_and_bits(generation.generate(version=0))
    generation.publish(buckets)
    received = generation.run(generation.worker.tensor_digests())
    expected = merged_by_peft(generation.model, folder / "adapter")
    assert received == {name: _hash(tensor) for name, tensor in expected.items()}
    assert "lm_head.weight" not in received
    published = texts_and_bits(generation.generate(version=0))
    assert published != old

    fresh = RunningWorker(folder)
    processes = fresh.engine.processes
    try:
        assert texts_and_bits(fresh.generate(version=0)) == published
        _check_death(fresh, processes)
    finally:
        fresh.stop()
    assert processes
    assert not any(psutil.pid_exists(pid) for pid in processes)
    with pytest.raises(EngineError, match="it was stopped"):
        asyncio.run(draw(fresh.worker, make_prompts(1), 1, 0))


def _check_death(running: RunningWorker, processes: tuple[int, ...]) -> None:
    """Kills an engine that draws; its caller learns of it at once, and later callers too."""

    async def kill_while_drawing():
        drawing = asyncio.create_task(_draw_long(running))
        await _until_drawing(running)
        for pid in processes:
            psutil.Process(pid).kill()
        with pytest.raises(EngineError, match="its process died"):
            await asyncio.wait_for(drawing, 20)

    running.run(kill_while_drawing())
    engine = running.engine
    assert (engine.is_alive, engine.version, engine.num_in_flight) == (False, None, 0)
    with pytest.raises(EngineError, match="its process died"):
        running.generate(version=0)
    with pytest.raises(EngineError, match="its process died"):
        running.run(running.worker.begin_update(1))


def test_a_tied_output_layer_may_be_sent_or_left_out(generation: RunningWorker, other_model):
    sent = weights_of(other_model)
    assert "lm_head.weight" not in sent
    generation.publish(make_buckets(sent))
    left_out = texts_and_bits(generation.generate(version=0))
    generation.reset()
    generation.publish(make_buckets(sent | {"lm_head.weight": sent["model.embed_tokens.weight"]}))
    assert texts_and_bits(generation.generate(version=0)) == left_out
    untied = sent | {"lm_head.weight": sent["model.embed_tokens.weight"] + 1}
    with pytest.raises(PublicationError, match="different values for lm_head.weight"):
        generation.publish(make_buckets(untied))


def _flip(bucket):
    data = bucket.data.copy()
    data[len(data) // 2] ^= 1
    return dataclasses.replace(bucket, data=data)


FAULTS = {
    "corrupted": (lambda b: [b[0], _flip(b[1]), *b[2:]], "digest"),
    "missing": (lambda b: b[:-1], "of 5 buckets"),
    "out of order": (lambda b: [b[1], b[0], *b[2:]], "bucket 1 of 5"),
    "of two models": (lambda b: [b[0], dataclasses.replace(b[1], count=9), *b[2:]], "bucket 1 of 9"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_update_stops_service_until_a_good_one(generation: RunningWorker, other_model, fault):
    spoil, words = FAULTS[fault]
    good = texts_and_bits(generation.generate(version=0))
    with pytest.raises(PublicationError, match=words):
        generation.publish(spoil(make_buckets(weights_of(other_model))))
    with pytest.raises(EngineError, match="serves nothing"):
        generation.generate(version=0)
    assert generation.engine.version is None
    generation.reset()
    assert texts_and_bits(generation.generate(version=0)) == good


def test_a_parameter_that_was_never_sent_is_named(generation: RunningWorker, other_model):
    sent = weights_of(other_model)
    del sent["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(PublicationError, match="model.layers.1.mlp.down_proj"):
        generation.publish(make_buckets(sent))
    sent = weights_of(other_model)
    del sent["model.layers.0.self_attn.v_proj.weight"]  # one part of a fused parameter
    with pytest.raises(PublicationError, match="qkv_proj"):
        generation.publish(make_buckets(sent))


def test_a_wrong_shape_and_an_unknown_name_are_refused(generation: RunningWorker, other_model):
    sent = weights_of(other_model)
    with pytest.raises(PublicationError):
        generation.publish(make_buckets(sent | {"model.norm.weight": torch.ones(7)}))
    with pytest.raises(PublicationError):
        generation.publish(make_buckets(sent | {"model.layers.9.extra.weight": torch.ones(7)}))
    with pytest.raises(EngineError, match="serves nothing"):
        generation.generate(version=0)


def test_buckets_need_an_open_update(generation: RunningWorker):
    bucket = make_bucket(0, 1, {"model.norm.weight": torch.ones(64)})
    with pytest.raises(PublicationError, match="no open update"):
        generation.run(generation.worker.receive_bucket([bucket]))
    assert generation.generate()


class StoreWithoutBuckets:
    """Its buckets went away with their learner."""

    def put(self, value):
        return value

    def get(self, handle):
        raise ValueLostError("object store", found="OwnerDiedError", needed="the bucket", action="Look.")


def test_a_bucket_that_is_gone_leaves_an_open_update_that_is_begun_anew(
    generation: RunningWorker, other_model, monkeypatch
):
    first, *_ = buckets = make_buckets(weights_of(other_model))
    version = generation.version

    async def cut():
        drawing = asyncio.create_task(_draw_long(generation))
        await _until_drawing(generation)
        await generation.worker.begin_update(version + 1)
        await generation.worker.receive_bucket([first])
        monkeypatch.setattr(generation.worker, "_store", StoreWithoutBuckets())
        with pytest.raises(ValueLostError):
            await generation.worker.receive_bucket([first])
        monkeypatch.undo()
        later = asyncio.create_task(draw(generation.worker, make_prompts(1), 1, version))
        await asyncio.sleep(0.1)
        assert not drawing.done() and not later.done(), "a mixture of weights draws nothing"
        assert generation.worker._engine.version is None
        await generation.worker.begin_update(version + 2)
        for bucket in buckets:
            await generation.worker.receive_bucket([bucket])
        await generation.worker.finish_update(version + 2, combine_digests([bucket.digest for bucket in buckets]))
        with pytest.raises(EngineError, match="abort"):
            await drawing
        return await later

    generation.version += 2
    [group] = generation.run(cut())
    assert group.weight_versions == (version + 2, version + 2)
    sent = {name: _hash(tensor) for name, tensor in weights_of(other_model).items()}
    assert generation.run(generation.worker.tensor_digests()) == sent


def test_an_update_that_is_never_finished_runs_out_of_time(generation: RunningWorker, monkeypatch):
    updates = generation.worker._engine.weights
    monkeypatch.setattr(updates, "_timeout_s", 0.5)

    async def half():
        await generation.worker.begin_update(99)
        waiting = asyncio.create_task(draw(generation.worker, make_prompts(1), 1, 0))
        await asyncio.sleep(0.1)
        assert not waiting.done(), "it waits for the update to end"
        with pytest.raises(EngineError, match="did not finish in 0.5 s"):
            await waiting

    generation.run(half())
    monkeypatch.undo()
    generation.reset()
    assert generation.generate()


LONG = SamplingConfig(max_tokens=150, ignore_eos=True)


async def _draw_long(generation: RunningWorker):
    """Draws by ``LONG`` where the worker's own completions would soon end."""
    usual, generation.worker._sampling = generation.worker._sampling, LONG
    try:
        return await draw(generation.worker, make_prompts(2), 2, 0)
    finally:
        generation.worker._sampling = usual


async def _until_drawing(generation: RunningWorker) -> None:
    """Waits until every request in flight has a token or two; each has ``LONG.max_tokens`` to go."""
    states = generation.worker._engine._link.llm.output_processor.request_states
    while not states or any(state.detokenizer.num_output_tokens() < 2 for state in states.values()):
        await asyncio.sleep(0.001)


def test_completions_in_flight_carry_the_versions_of_their_tokens(generation: RunningWorker, other_model):
    buckets = make_buckets(weights_of(other_model))
    old = generation.version

    async def change():
        drawing = asyncio.create_task(_draw_long(generation))
        await _until_drawing(generation)
        await generation.worker.begin_update(old + 1)
        for bucket in buckets:
            await generation.worker.receive_bucket([bucket])
        await generation.worker.finish_update(old + 1, combine_digests([b.digest for b in buckets]))
        return await drawing

    generation.version += 1
    for group in generation.run(change()):
        assert group.weight_versions == (old, old + 1)
        for rollout in group.payload.rollouts:
            first, second = rollout.completion.version_spans
            assert (first.version, first.start, second.version, second.end) == (old, 0, old + 1, 150)
            assert 0 < first.end == second.start < 150


def test_an_aborted_update_fails_what_was_in_flight(generation: RunningWorker):
    async def abort():
        drawing = asyncio.create_task(_draw_long(generation))
        await _until_drawing(generation)
        await generation.worker.begin_update(99)
        await generation.worker.abort_update()
        with pytest.raises(EngineError, match="abort"):
            await drawing
        return generation.engine.num_in_flight

    assert generation.run(abort()) == 0


@pytest.mark.parametrize("is_updating", [False, True])
def test_what_a_lost_driver_asked_for_is_given_up_and_stale_weights_are_not_served(
    generation: RunningWorker, is_updating: bool
):
    async def lose_the_driver():
        drawing = asyncio.create_task(_draw_long(generation))
        await _until_drawing(generation)
        left = [drawing]
        if is_updating:
            await generation.worker.begin_update(99)
            left.append(asyncio.create_task(_draw_long(generation)))  # stands in line for the update's end
            await asyncio.sleep(0)
        await generation.worker.abandon()
        for call in left:
            with pytest.raises(EngineError, match="abort|is gone"):
                await call
        return generation.engine.num_in_flight

    assert generation.run(lose_the_driver()) == 0
    with pytest.raises(EngineError, match="its driver is gone"):
        generation.generate(version=0)
    generation.reset()
    whole = texts_and_bits(generation.generate())
    generation.run(generation.engine.abandon("its driver is gone", serve=True))
    assert texts_and_bits(generation.generate()) == whole, "whose weights never change may serve on"


def test_defaults_are_usable():
    assert EngineConfig().kv_cache_gib == 1.0
