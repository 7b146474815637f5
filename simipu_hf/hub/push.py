"""Publishing on the Hub: a finished folder, a run while it trains, a data set.

Every upload is one commit, so that a repository holds all of a model or none of it.
"""

import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any, Literal, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from simipu_hf.errors import SimIPUError
from simipu_hf.hub.card import dataset_card, redact, write_model_card
from simipu_hf.hub.export import export_image_encoder
from simipu_hf.hub.weights import read_json, read_safetensors

Strategy = Literal["end", "every_save", "checkpoint"]
Result = TypeVar("Result")

# What a model repository takes: no pickles, no optimizer states.
PUBLIC = {".json", ".jsonl", ".yaml", ".safetensors", ".py", ".md", ".png", ".html"}
# What resumes a run, beside the model; pushed with the strategy "checkpoint" alone.
RESUME = {"training_state.pt", "training_state.json", "manifest.json"}
STAGED = ".hub-upload-"
SLOWEST_UPLOAD = 250_000  # bytes a second; an attempt that takes longer counts as hung


@dataclass
class PushReport:
    """Where something was published: the pages of the repositories and the commit of the first."""

    url: str
    commit: str
    encoder_url: str | None = None

    def __str__(self) -> str:
        return f"published {self.url} ({self.commit[:8]})" + (
            f"\npublished {self.encoder_url}" if self.encoder_url else ""
        )


def push_folder(
    model: str | Path,
    repo_id: str,
    private: bool | None = None,
    encoder_repo_id: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    retries: int = 4,
    report: Callable[[str], None] = print,
) -> PushReport:
    """Publish a run folder, a converted model, a depth model, or an encoder folder, with a card.

    The repository of a SimIPU model holds the model as remote code at its root and the image encoder as a plain timm
    folder in `image_encoder/`. Weights are safetensors only.

    Args:
        model: the folder.
        repo_id: `user/name`; created if it does not exist.
        private: of a repository that is created; `None` leaves it to the account's setting.
        encoder_repo_id: also publish the image encoder as a repository of its own, for RGB images.
        token: the logged-in user's if `None`.
        revision: branch; `main` if `None`.
        retries: attempts after a failure that may pass (server error, timeout, no connection).
        report: is told about retries.

    Raises:
        SimIPUError: no complete model in the folder, or the upload failed; the message says why.
    """
    folder = Path(model)
    _check_complete(folder)
    upload = _Upload(token, private, retries, report)
    with _staged(folder, repo_id, encoder_repo_id) as staged:
        commit = upload(staged, repo_id, commit_message, revision)
    encoder_url = None
    if encoder_repo_id is not None:
        with tempfile.TemporaryDirectory() as temporary:
            encoder = Path(temporary) / encoder_repo_id.split("/")[-1]
            export_image_encoder(folder, encoder, "timm", channel_order="rgb")
            for name in ("run.yaml", "metrics.jsonl"):
                if (folder / name).is_file():
                    _copy_redacted(folder / name, encoder / name)
            write_model_card(encoder, encoder_repo_id)
            upload(encoder, encoder_repo_id, commit_message, revision)
        encoder_url = f"{constants.ENDPOINT}/{encoder_repo_id}"
    return PushReport(f"{constants.ENDPOINT}/{repo_id}", commit, encoder_url)


class HubUploader:
    """Publishes a run while it trains, in the background; never raises into the training loop.

    Create one on the main process, call [`checkpoint_saved`] after each checkpoint and [`finish`] after the final
    folder is written. A checkpoint that is written while an upload still runs is skipped, as the next one follows.

    Args:
        repo_id: `user/name`.
        output_dir: of the run.
        strategy: as transformers' Trainer names them: `"end"` publishes the final model; `"every_save"` also each
            checkpoint, at the repository's root; `"checkpoint"` also what resumes the run, in `last-checkpoint/`.
        private: of a repository that is created.
        token: the logged-in user's if `None`.
        encoder_repo_id: at the end, also publish the image encoder there.
        retries: attempts after a failure that may pass.
        report: is told what was published, what failed and why.
    """

    def __init__(
        self,
        repo_id: str,
        output_dir: str | Path,
        strategy: Strategy = "every_save",
        private: bool | None = None,
        token: str | None = None,
        encoder_repo_id: str | None = None,
        retries: int = 4,
        report: Callable[[str], None] = print,
    ) -> None:
        if strategy not in ("end", "every_save", "checkpoint"):
            raise SimIPUError(f"--hub_strategy {strategy}: choose from end, every_save, checkpoint")
        self.repo_id = repo_id
        self.output_dir = Path(output_dir)
        self.strategy = strategy
        self.private = private
        self.token = token
        self.encoder_repo_id = encoder_repo_id
        self.retries = retries
        self.report = report
        self._thread: threading.Thread | None = None
        for leftover in self.output_dir.glob(f"{STAGED}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def checkpoint_saved(self, checkpoint: str | Path) -> bool:
        """Start publishing a complete checkpoint; false if it is skipped (strategy, or an upload still runs)."""
        checkpoint = Path(checkpoint)
        if self.strategy == "end" or (self._thread is not None and self._thread.is_alive()):
            return False
        try:
            _check_complete(checkpoint)
            staged = _stage(checkpoint, self.output_dir, self.strategy == "checkpoint")
        except (OSError, SimIPUError) as error:
            self.report(f"Hub: {checkpoint.name} was not published: {error}")
            return False
        # a daemon: a run that ends does not wait for it, and a commit that is not made leaves nothing behind
        self._thread = threading.Thread(target=self._publish, args=(staged, checkpoint.name), daemon=True)
        self._thread.start()
        return True

    def finish(self) -> PushReport | None:
        """Wait for the background, publish the final folder; `None` if that failed, after reporting why."""
        if self._thread is not None:
            self._thread.join()
        try:
            result = push_folder(
                self.output_dir,
                self.repo_id,
                self.private,
                self.encoder_repo_id,
                self.token,
                commit_message="End of training",
                retries=self.retries,
                report=self.report,
            )
        except Exception as error:
            encoder = f" --encoder_repo_id {self.encoder_repo_id}" if self.encoder_repo_id else ""
            self.report(
                f"Hub: the model was not published: {error}\nIt is in {self.output_dir}; publish it later with\n"
                f"  simipu-hf push --model {self.output_dir} --repo_id {self.repo_id}{encoder}"
            )
            return None
        self.report(f"Hub: {result}")
        return result

    def _publish(self, staged: Path, name: str) -> None:
        try:
            _complete(staged, self.repo_id)
            upload = _Upload(self.token, self.private, self.retries, self.report)
            commit = upload(staged, self.repo_id, f"Training in progress, {name}")
            self.report(f"Hub: published {name} as {self.repo_id} ({commit[:8]})")
        except Exception as error:  # whatever it is, training goes on
            self.report(f"Hub: {name} was not published: {error}")
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def push_dataset(
    data: str | Path,
    repo_id: str,
    private: bool | None = None,
    license: str | None = None,
    token: str | None = None,
    retries: int = 4,
    report: Callable[[str], None] = print,
) -> PushReport:
    """Publish a folder of Parquet files as a data set, with a card.

    Args:
        data: the folder, as `simipu-hf data convert --to parquet` writes it.
        repo_id: `user/name`.
        private: `None` means private where the rows are KITTI's.
        license: the Hub's name of the rows' licence, such as `"cc-by-4.0"`; `None` means that they come from KITTI
            (CC BY-NC-SA 3.0), of which the card and the report warn.
        token, retries, report: as in [`push_folder`].

    Raises:
        SimIPUError: no Parquet files, or the upload failed.
    """
    import pyarrow.parquet

    folder = Path(data)
    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
    if not files:
        raise SimIPUError(f"{folder}: expected a folder of Parquet files, found none")
    try:
        rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
    except (OSError, ValueError) as error:
        raise SimIPUError(f"{folder}: a Parquet file cannot be read: {error}") from error
    if license is None:
        private = True if private is None else private
        report(
            "These rows are treated as KITTI's: CC BY-NC-SA 3.0, no commercial use, same terms. The repository is "
            f"{'private' if private else 'PUBLIC'}. For other data name their --license."
        )
    splits = sorted({re.split(r"[-.]", file.name)[0] for file in files})
    with tempfile.TemporaryDirectory(prefix=STAGED) as temporary:
        staged = Path(temporary)
        for file in [*files, *folder.glob("*.json")]:
            target = staged / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(file, target)
        (staged / "README.md").write_text(dataset_card(repo_id, license, rows, splits), encoding="utf-8")
        upload = _Upload(token, private, retries, report, repo_type="dataset")
        commit = upload(staged, repo_id, "Upload data set")
    return PushReport(f"{constants.ENDPOINT}/datasets/{repo_id}", commit)


@dataclass
class _Upload:
    """One folder as one commit, tried again where that can help."""

    token: str | None
    private: bool | None
    retries: int
    report: Callable[[str], None]
    repo_type: str = "model"

    def __call__(self, folder: Path, repo_id: str, message: str, revision: str | None = None) -> str:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        seconds = 60 + size / SLOWEST_UPLOAD
        for attempt in range(self.retries + 1):
            try:
                return _within(seconds, lambda: self._once(folder, repo_id, message, revision))
            except Exception as error:
                reason = explain_hub_error(error, repo_id, revision)
                if attempt == self.retries or not _may_pass(error):
                    raise reason from error
                wait = min(2.0**attempt, 60.0)
                self.report(f"Hub: {reason}; trying again in {wait:.0f} s ({attempt + 1} of {self.retries})")
                sleep(wait)
        raise AssertionError("unreachable")

    def _once(self, folder: Path, repo_id: str, message: str, revision: str | None) -> str:
        api = HfApi(token=self.token)
        api.create_repo(repo_id, repo_type=self.repo_type, private=self.private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, repo_type=self.repo_type, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=self.repo_type,
            folder_path=folder,
            commit_message=message,
            revision=revision,
        )
        return commit.oid


def explain_hub_error(error: Exception, repo_id: str, revision: str | None = None) -> SimIPUError:
    """What went wrong between here and the Hub, in words that say what to do."""
    causes = list(_causes(error))

    def found(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    status = _status(causes)
    if isinstance(error, SimIPUError):
        return error
    if found(HFValidationError):
        why = "is no repository name; expected user/name"
    elif found(OfflineModeIsEnabled) or constants.is_offline_mode():
        why = "is not in the local cache, and HF_HUB_OFFLINE forbids to look on the Hub"
    elif found(RevisionNotFoundError):
        why = f"has no revision {revision!r}"
    elif found(GatedRepoError):
        why = "is gated: ask for access on its page, and log in with `hf auth login`"
    elif found(LocalTokenNotFoundError) or (status == 401 and not found(RepositoryNotFoundError)):
        why = "needs a valid token: `hf auth login`, or set HF_TOKEN"
    elif status == 403:
        why = "may not be written with this token: it has no write permission there, or the repository is another's"
    elif found(RepositoryNotFoundError):
        why = "does not exist, or is private and this token may not see it"
    elif status is not None and status >= 500:
        why = f"could not be reached: the server answered {status}"
    elif status is not None:
        why = f"was refused by the server ({status}: {_first_line(error)})"
    elif any(_is_network_error(cause) for cause in causes) or found(LocalEntryNotFoundError):
        why = f"could not be reached ({_first_line(causes[-1])})"
    else:
        why = f"failed: {_first_line(error)}"
    return SimIPUError(f"{repo_id} {why}")


def _may_pass(error: Exception) -> bool:
    causes = list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return False
    status = _status(causes)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return any(_is_network_error(cause) for cause in causes)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _status(causes: list[BaseException]) -> int | None:
    answers = [cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)]
    return answers[0] if answers else None


def _is_network_error(error: BaseException) -> bool:
    # the HTTP client behind huggingface_hub changes its name between versions
    client = type(error).__module__.split(".")[0].rstrip("0123456789")
    return isinstance(error, (ConnectionError, TimeoutError)) or client in ("httpx", "httpcore", "requests", "urllib")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(lines[0] if lines else type(error).__name__)


def _within(seconds: float, action: Callable[[], Result]) -> Result:
    """`action()`, or a TimeoutError: the Hub's client itself would wait for ever for a server that says nothing."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome[:] = [True, action()]
        except Exception as error:
            outcome[:] = [False, error]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no end after {seconds:.0f} s")
    succeeded, value = outcome
    if not succeeded:
        raise value
    return value


def _check_complete(folder: Path) -> None:
    """Raise a SimIPUError unless `folder` holds a model whose weights can be read."""
    if not (folder / "config.json").is_file():
        raise SimIPUError(f"{folder}: expected a model folder with config.json")
    config = read_json(folder / "config.json")
    if "image_config" not in config and "architecture" not in config:
        raise SimIPUError(f"{folder / 'config.json'}: neither a SimIPU model nor a timm encoder")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SimIPUError(f"{folder}: expected safetensors weights, found none")
    for file in weights:
        read_safetensors(file, prefix="\0")  # reads the header and the file's length, no tensor


@contextmanager
def _staged(folder: Path, repo_id: str, encoder_repo_id: str | None) -> Iterator[Path]:
    """A folder with exactly what is to be published of `folder`, its encoder and a card included."""
    staged = _stage(folder, folder, resumable=False)
    try:
        _complete(staged, repo_id, encoder_repo_id)
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _stage(folder: Path, beside: Path, resumable: bool) -> Path:
    """A snapshot of the public files of `folder` in a hidden folder in `beside`; big files are hard links."""
    try:
        staged = Path(tempfile.mkdtemp(prefix=STAGED, dir=beside))
    except OSError:  # a read-only folder can still be published
        staged = Path(tempfile.mkdtemp(prefix=STAGED))
    try:
        run_files = [beside / name for name in ("run.yaml", "metrics.jsonl")] if beside != folder else []
        for file in [*_public_files(folder), *run_files]:
            if file.is_file():
                inside = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
                _place(file, staged / inside)
        if resumable:
            for file in [*_public_files(folder), *(folder / name for name in RESUME)]:
                if file.is_file():
                    _place(file, staged / "last-checkpoint" / file.relative_to(folder))
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return staged


def _complete(staged: Path, repo_id: str, encoder_repo_id: str | None = None) -> None:
    """Add to a snapshot what its folder may lack: the encoder as a timm folder, and the card."""
    config = read_json(staged / "config.json")
    if "image_config" in config and not (staged / "image_encoder").exists():
        export_image_encoder(staged, staged / "image_encoder", "timm")
    write_model_card(staged, repo_id, encoder_repo_id)


def _public_files(folder: Path) -> Iterator[Path]:
    for sub in ("", "image_encoder", "pictures"):
        for file in sorted((folder / sub).glob("*")):
            if file.is_file() and file.suffix in PUBLIC and file.name not in RESUME and file.name[0] != ".":
                yield file
    yield from sorted(folder.glob("logs/**/events.out.tfevents.*"))


def _place(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in (".yaml", ".json", ".jsonl", ".md"):
        _copy_redacted(file, target)
    elif file.suffix in (".safetensors", ".pt"):
        _link(file, target)  # never changed in place, so a link is a snapshot
    else:
        shutil.copyfile(file, target)


def _copy_redacted(file: Path, target: Path) -> None:
    target.write_text(redact(file.read_text(encoding="utf-8")), encoding="utf-8")


def _link(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, target)
