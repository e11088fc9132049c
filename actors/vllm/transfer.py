"""The receiving end of weight publication, inside the engine's worker process.

The worker is not a Ray process, so its owner hands each bucket over as a sealed memory file (``memfd``): it has no name
in any file system, nobody else can open it, nothing can change it after it was written, and it is gone with its owner.
Layout: 8 bytes little-endian length of the header, the header in JSON, the tensors' bytes.

Importing this module registers the engine with vLLM under ``BACKEND``; vLLM does so in every worker, because the module
holds the worker extension class.
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from actors.vllm.watchdog import arm_from_environment
from rlhf.errors import PublicationError
from rlhf.weights import Bucket, bucket_tensors, combine_digests, verify_bucket

BACKEND = "rlhf_object_store"
EXTENSION = "actors.vllm.transfer.TransferExtension"
_MAX_HEADER_BYTES = 64 << 20
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

arm_from_environment()
# It warns at every update of layers without parameters; ``check_complete`` says what really is missing.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


@contextmanager
def shared_file(bucket: Bucket) -> Iterator[str]:
    """Writes a bucket to a sealed memory file and yields the path by which a child process can open it."""
    head = {
        "index": bucket.index,
        "count": bucket.count,
        "names": bucket.names,
        "shapes": bucket.shapes,
        "dtype": bucket.dtype,
        "digest": bucket.digest,
    }
    header = json.dumps(head).encode()
    descriptor = os.memfd_create(f"rlhf-bucket-{bucket.index}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for part in (len(header).to_bytes(8, "little"), header, bucket.data.data):
            view = memoryview(part).cast("B")
            while view:
                view = view[os.write(descriptor, view) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def read_shared_file(path: str) -> Bucket:
    """Maps a bucket that ``shared_file`` wrote; what it holds has not been verified yet."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # A private mapping: torch wants writable memory, and the file itself cannot be written any more.
        mapping = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)
    length = int.from_bytes(mapping[:8], "little")
    if length > min(_MAX_HEADER_BYTES, len(mapping) - 8):
        raise PublicationError(
            "weight bucket",
            found=f"a header of {length} bytes in a file of {len(mapping)}",
            needed="a whole header",
            action="Publish the weights again.",
        )
    head = json.loads(mapping[8 : 8 + length])
    return Bucket(
        index=head["index"],
        count=head["count"],
        names=tuple(head["names"]),
        shapes=tuple(tuple(shape) for shape in head["shapes"]),
        dtype=head["dtype"],
        data=np.frombuffer(mapping, dtype=np.uint8, offset=8 + length),
        digest=head["digest"],
    )


@dataclass
class InitInfo(WeightTransferInitInfo):
    """There is nothing to agree on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One bucket.

    Attributes:
        path: Where the worker opens it.
    """

    path: str


class ObjectStoreTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Takes a model in buckets, in order, and loads each one as it comes.

    A failed update leaves a mixture of old and new weights, which the owner must not serve. The next update starts
    from a clean state whatever became of the one before.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._load_weights: Any = self.model.load_weights
        self._tied = _tied_parameters(self.model)
        self._open = False
        self._bucket_digests: list[str] = []
        self._loaded: set[str] = set()
        self.tensor_digests: dict[str, str] = {}
        self.count = 0

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Does nothing: buckets need no connection."""

    def start_weight_update(self) -> None:
        """Prepares each layer to be loaded again."""
        self.discard()
        initialize_layerwise_reload(self.model)
        self._open = True
        self._bucket_digests, self._loaded, self.tensor_digests, self.count = [], set(), {}, 0

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads one bucket; unlike vLLM's own, this needs no accelerator to wait for."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Verifies a bucket and loads its tensors."""
        bucket = read_shared_file(update_info.path)
        expected = len(self._bucket_digests)
        if bucket.index != expected or (expected and bucket.count != self.count):
            raise PublicationError(
                "weight publication",
                found=f"bucket {bucket.index} of {bucket.count}",
                needed=f"bucket {expected} of {self.count or bucket.count}",
                action="Publish the weights again.",
            )
        self.tensor_digests |= verify_bucket(bucket)
        tensors = bucket_tensors(bucket)
        # Between start and finish each layer stands alone, so a tied one gets its values too.
        aliases = {name: tensors[source] for name, source in self._tied.items() if source in tensors}
        own = {name: tensor for name, tensor in tensors.items() if name not in self._tied}
        self._loaded |= set(self._load_weights((own | aliases).items()))
        self._bucket_digests.append(bucket.digest)
        self.count = bucket.count

    def check_complete(self, digest: str) -> None:
        """Raises ``PublicationError`` unless the buckets are those of the sender and fill the whole model."""
        found = combine_digests(self._bucket_digests)
        if len(self._bucket_digests) != self.count or not self.count or found != digest:
            raise PublicationError(
                "weight publication",
                found=f"{len(self._bucket_digests)} of {self.count} buckets, digest {found[:16]}",
                needed=f"all of them, digest {digest[:16]}",
                action="Publish the weights again.",
            )
        for name, source in self._tied.items():
            sent = {self.tensor_digests[part] for part in (name, source) if part in self.tensor_digests}
            if len(sent) > 1:
                raise PublicationError(
                    "weight publication",
                    found=f"different values for {name} and {source}",
                    needed="equal ones, as this model has them tied",
                    action="Train with tied embeddings, or set tie_word_embeddings to false in the model's config.",
                )
        missing = sorted(self._missing())
        if missing:
            raise PublicationError(
                "weight publication",
                found=f"no values for {len(missing)} parameters, first {missing[0]}",
                needed="every parameter of the model",
                action="Compare the names that the learner exports with those of the model's folder.",
            )

    def _missing(self) -> Iterator[str]:
        for prefix, layer in self.model.named_modules():
            names = [f"{prefix}.{name}" for name, _ in layer.named_parameters(recurse=False)]
            yield from (name for name in names if name not in self._loaded and name not in self._tied)
            info = get_layerwise_info(layer)
            padded = isinstance(layer, VocabParallelEmbedding)  # its padding rows are never sent
            if names and info.can_load() and not padded and not is_deferred_attention_layer(layer):
                yield f"{prefix} ({info.load_numel} of {info.load_numel_total} numbers)"

    def finish_weight_update(self) -> None:
        """Puts the layers in order for serving."""
        self.discard()

    def discard(self) -> None:
        """Ends an open update; layers that lack tensors then hold a mixture."""
        if self._open:
            finalize_layerwise_reload(self.model, self.model_config)
            self._open = False
            self._pack_tied()

    def _pack_tied(self) -> None:
        """Renews what the kernels of a tied layer keep besides its parameter.

        On CPU a layer computes with a packed copy. Where the checkpoint names the source parameter differently from
        the model, the tied layer was not loaded by itself, and its copy would stay that of the old weights.
        """
        for name in self._tied:
            layer = self.model.get_submodule(name.rpartition(".")[0])
            if name not in self._loaded and isinstance(layer.quant_method, QuantizeMethodBase):
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Does nothing: there is no connection."""


def _tied_parameters(model: torch.nn.Module) -> dict[str, str]:
    """Names of embedding parameters that are another one's, such as a tied output layer, to the name of that one."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for prefix, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, VocabParallelEmbedding):
            for name, parameter in layer.named_parameters(prefix, recurse=False):
                source = first.setdefault(id(parameter), name)
                if source != name:
                    tied[name] = source
    return tied


WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreTransferEngine)


class TransferExtension:
    """Methods that vLLM adds to its worker, for the owner to call."""

    weight_transfer_engine: ObjectStoreTransferEngine
    _weight_update_active: bool

    def rlhf_check_complete(self, digest: str) -> None:
        """See ``ObjectStoreTransferEngine.check_complete``."""
        self.weight_transfer_engine.check_complete(digest)

    def rlhf_discard_update(self) -> None:
        """Ends an update that will not be finished, if one is open."""
        self.weight_transfer_engine.discard()
        self._weight_update_active = False

    def rlhf_tensor_digests(self) -> dict[str, str]:
        """The digest of each tensor that the last update handed to the model, by Hugging Face name."""
        return dict(self.weight_transfer_engine.tensor_digests)
