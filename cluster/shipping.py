"""What a submitted run takes along: its recipe, resolved, the files that the recipe names, and this code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os.path
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cluster.config import RunConfig, map_paths, read_run_config, roles_of
from rlhf.config import dump, load_file, parse_yaml, to_yaml
from rlhf.errors import ConfigError
from rlhf.models.resolve import PACKAGE_PREFIX
from rlhf.runs.changes import config_changes
from rlhf.runs.environment import REVISION_FILE, git_revision
from rlhf.runs.names import INPUTS
from rlhf.runs.redact import redact

LIMIT_BYTES = 100 * 2**20
"""The most that Ray's job server accepts as one package."""

JOB_FOLDER = "job"
"""Of the working directory, beside the packages: the recipe and its files."""

RECIPE = "recipe.yaml"

PACKAGES = ("rlhf", "actors", "cluster")


@dataclass(frozen=True)
class Shipment:
    """A run that is ready to be sent.

    Attributes:
        run_dir: The run directory on the cluster.
        config: The recipe with the paths that hold on the cluster.
        recipe: The same as text.
        inputs: What came with the recipe, by its place under ``RUN/inputs``: a local file, or a text.
    """

    run_dir: PurePosixPath
    config: RunConfig
    recipe: str
    inputs: dict[str, Path | str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Tells recipes apart; the files that came along count by their content."""
        return _digest(self.recipe.encode())


def prepare(path: Path, overrides: Iterable[str], storage: Path | None) -> Shipment:
    """Resolves a recipe for a cluster.

    Data files and constitutions that the recipe names by a relative path are on this machine and go along; they will
    lie in ``RUN/inputs``, under a name that tells their content. Absolute paths are the cluster's and stay as they are.

    Args:
        path: The recipe.
        overrides: ``key=value`` items.
        storage: Folder of the cluster's shared storage from which a relative ``run_dir`` counts.

    Raises:
        ConfigError: A fault of the recipe, a file that is not there, a model that would have to go along, something
            that looks like a secret, or more than Ray accepts.
    """
    written = read_run_config(path, overrides)
    run_dir = run_directory(written, storage)
    base = path.resolve().parent
    inputs: dict[str, Path | str] = {}

    def file(key: str, named: str) -> str:
        if named.startswith("/"):
            return named
        local = (base / Path(named).expanduser()).resolve()
        if not local.is_file():
            needed, action = "a file to send along", "Check the path; one that lies on the cluster has to be absolute."
            raise ConfigError(key, found=f"no file {local}", needed=needed, action=action)
        content = _whole_constitution(local) if key.startswith("constitutions.") else local
        place = f"{_digest_of(content)}/{local.name}"
        inputs[place] = content
        return str(run_dir / INPUTS / place)

    mapped = map_paths(written, file=file, model=lambda key, named: _model(key, named, base))
    config = mapped.model_copy(update={"run_dir": Path(run_dir)})
    _check_sizes(inputs)
    recipe = dump(config)
    _refuse_secrets(recipe)
    return Shipment(run_dir, config, recipe, inputs)


def run_directory(config: RunConfig, storage: Path | None) -> PurePosixPath:
    """Where the run is kept on the cluster; ``ConfigError`` where the recipe and ``storage`` leave that open."""
    if storage is not None and not storage.is_absolute():
        action = "Name the folder as the cluster's nodes know it."
        raise ConfigError("--storage", found=str(storage), needed="an absolute path", action=action)
    own = config.run_dir or Path("runs") / config.name
    if str(own).startswith("~") or (storage is None and not own.is_absolute()):
        raise ConfigError(
            "run_dir",
            found=str(own),
            needed="a folder that all nodes of the cluster share, by its absolute path",
            action="Add run_dir=/shared/runs/NAME, or --storage /shared from which relative ones count.",
        )
    return PurePosixPath(os.path.normpath((storage or Path("/")) / own))


def judge_key_variable(config: RunConfig) -> str | None:
    """The environment variable that the run's judging service needs on the cluster; None where it needs none."""
    endpoint = config.roles.judge.endpoint
    used = any("judge" in roles_of(config, stage) for stage in config.stages)
    return endpoint.api_key_variable if endpoint is not None and used else None


def pack(shipment: Shipment, folder: Path) -> None:
    """Fills ``folder`` with the working directory of the job: packages, recipe, files, and the code's revision.

    Raises:
        ConfigError: It is more than Ray accepts.
    """
    for name in PACKAGES:
        shutil.copytree(_source(name), folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    if (revision := git_revision()) is not None:
        (folder / REVISION_FILE).write_text(json.dumps(revision), encoding="utf-8")
    job = folder / JOB_FOLDER
    for place, content in shipment.inputs.items():
        target = job / INPUTS / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_text(content, encoding="utf-8")
    job.mkdir(exist_ok=True)
    (job / RECIPE).write_text(shipment.recipe, encoding="utf-8")
    _check_total("what goes along", {str(p): p.stat().st_size for p in folder.rglob("*") if p.is_file()})


def _source(package: str) -> Path:
    """The folder of one of our packages, in a source tree or installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        action = "Run the command from an installation or a source tree."
        raise ConfigError("rlhf submit", found=f"no package {package}", needed="all of its code", action=action)
    return Path(next(iter(spec.submodule_search_locations)))


def _model(key: str, named: str, base: Path) -> str:
    """A model's name on the cluster: models are not sent."""
    if named.startswith((PACKAGE_PREFIX, "/")):
        return named
    if named.startswith((".", "~")) or (base / named).exists():
        raise ConfigError(
            key,
            found=f"{named}, a folder on this machine",
            needed="a model that the cluster's nodes can read",
            action="Copy it to the shared storage and name it by its absolute path there, or name a hub id.",
        )
    return named


def _whole_constitution(path: Path) -> str:
    """A constitution with its includes and its own template in one text; what it says stays the same."""
    from rlhf.feedback.constitution import load_constitution

    load_constitution(path)
    document = load_file(path)
    named = document["template"]
    template = (path.parent / named).resolve() if named.endswith(".txt") and "\n" not in named else None
    if template is not None and template.is_relative_to(path.parent) and template.is_file():
        text = template.read_text(encoding="utf-8")
        document["template"] = text if text.endswith("\n") else text + "\n"
    return to_yaml(document)


def _refuse_secrets(recipe: str) -> None:
    document = parse_yaml(recipe, "recipe")
    found = config_changes(document, redact(document))
    if found:
        raise ConfigError(
            next(iter(found)),
            found="what looks like a secret",
            needed="a recipe without secrets: it is sent to the cluster and kept in the record",
            action="Set secrets in the environment of the cluster's nodes.",
        )


def _check_sizes(inputs: dict[str, Path | str]) -> None:
    sizes = {str(item): item.stat().st_size for item in inputs.values() if isinstance(item, Path)}
    _check_total("the files of the recipe", sizes)


def _check_total(where: str, sizes: dict[str, int]) -> None:
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            where,
            found=f"{total / 2**20:.0f} MiB, of which {largest} has {sizes[largest] / 2**20:.0f}",
            needed=f"at most {LIMIT_BYTES // 2**20} MiB, which is what Ray sends",
            action="Copy it to the shared storage and name it by its absolute path there.",
        )


def _digest_of(content: Path | str) -> str:
    if isinstance(content, str):
        return _digest(content.encode())
    with content.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
