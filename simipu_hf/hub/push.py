"""Publishing on the Hub: a finished folder, a run while it trains, a data set.

Every upload is one commit, so that a repository holds all of a model or none of it.
"""

import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

import pyarrow.parquet
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import filter_repo_objects
from tqdm.auto import tqdm

from simipu_hf.data.sources import license_of
from simipu_hf.errors import MAY_HANG, SimIPUError
from simipu_hf.hub.card import (
    CURVES,
    EVALUATIONS,
    GENERATED,
    KITTI_LICENSE,
    dataset_card,
    redact,
    run_of,
    write_model_card,
)
from simipu_hf.hub.export import write_timm
from simipu_hf.hub.sources import TRAINED_STATISTICS, find_image_encoder, hub_error, model_folder
from simipu_hf.hub.weights import read_json, read_safetensors
from simipu_hf.training.arguments import RunArguments
from simipu_hf.training.logging import METRICS_FILE

Result = TypeVar("Result")
Files = Mapping[str, Path | bytes]  # by their names in the repository

# What a model repository takes: no pickles, no optimizer states.
PUBLIC = {".json", ".jsonl", ".yaml", ".safetensors", ".py", ".md", ".png", ".html"}
TEXT = {".json", ".jsonl", ".yaml", ".md"}
# What resumes a run, beside the model; pushed with the strategy "checkpoint" alone. The second line is Trainer's.
RESUME = re.compile(
    r"training_state\.pt|manifest\.json"
    r"|trainer_state\.json|(optimizer|scheduler|scaler)\.pt|rng_state\w*\.pth"
)
# What of a run belongs to each of its checkpoints, and to its encoder.
RECORDS = ("run.yaml", METRICS_FILE, CURVES)
# What an earlier upload may have left under names that this one does not have; the Hub's * also matches /.
REPLACED = [
    *("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors", TRAINED_STATISTICS),
    *("image_encoder/*", *RECORDS, EVALUATIONS),
]
STAGED = ".hub-upload-"
RETRIES = 4  # after a failure that may pass: a server's error, a timeout, no connection
SHORTEST_LIMIT, SLOWEST_UPLOAD = 60, 250_000  # seconds, bytes a second: an attempt that takes longer counts as hung
LAST_WAIT = 20  # seconds that a run which an error or a signal ends waits for a running upload


@dataclass
class PushReport:
    """Where something was published: the pages of the repositories and the commit of the first."""

    url: str
    commit: str
    encoder_url: str | None = None

    def __str__(self) -> str:
        encoder = f"\npublished {self.encoder_url}" if self.encoder_url else ""
        return f"published {self.url} ({self.commit[:8]}){encoder}"


def _upload(
    repo_id: str,
    files: Files,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    repo_type: str = "model",
) -> PushReport:
    """Publish `files` as one commit, without what an earlier upload left of their kind; again where that can help."""
    size = sum(content.stat().st_size for content in files.values() if isinstance(content, Path))
    attempt = 0
    while True:
        try:
            # the client retries transfers, but not what comes before and after them, and has no time limit
            upload = _in_background(lambda: _commit(repo_id, files, message, private, revision, repo_type))
            commit = upload.result(SHORTEST_LIMIT + size / SLOWEST_UPLOAD)
            kind = "datasets/" if repo_type == "dataset" else ""
            return PushReport(f"{constants.ENDPOINT}/{kind}{repo_id}", commit)
        except Exception as error:
            if attempt == RETRIES or _is_final(error):
                raise hub_error(error, repo_id) from error
            wait, attempt = 2**attempt, attempt + 1
            trying = f"trying again in {wait} s ({attempt} of {RETRIES})"
            tqdm.write(f"{hub_error(error, repo_id)}; {trying}", file=sys.stderr)
            sleep(wait)


def _commit(
    repo_id: str, files: Files, message: str, private: bool | None, revision: str | None, repo_type: str
) -> str:
    api = HfApi()
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise SimIPUError(
            f"Hub repository {repo_id}: expected a private one, found a public one, which stays public: make it "
            "private in its settings, or choose another"
        )
    if revision is not None:
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
    info = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    there = api.list_repo_files(repo_id, repo_type=repo_type, revision=info.sha)
    patterns = ["*.parquet"] if repo_type == "dataset" else REPLACED
    if any(name.startswith("last-checkpoint/") for name in files):
        patterns = [*patterns, "last-checkpoint/*"]
    replaced = set(filter_repo_objects(there, allow_patterns=patterns)) - files.keys()
    if repo_type == "dataset" and (others := {*map(split_of, replaced)} - {*map(split_of, files)}):
        raise SimIPUError(
            f"Hub repository {repo_id}: expected no split that is not published now, found "
            f"{', '.join(sorted(others))}: publish all splits in one folder, or delete those there"
        )
    if repo_type == "model" and "README.md" in there and _keeps_its_card(repo_id, info.sha, files["README.md"]):
        files = {name: content for name, content in files.items() if name != "README.md"}
        tqdm.write(f"{repo_id}: its card, which was edited there, is kept", file=sys.stderr)
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(replaced)]
    # upload_folder makes several commits of a large folder
    commit = api.create_commit(
        repo_id, operations, commit_message=message, repo_type=repo_type, revision=revision, parent_commit=info.sha
    )
    return commit.oid


def _keeps_its_card(repo_id: str, commit: str | None, card: Any) -> bool:
    """Whether a model's card was edited on the Hub, and the new one is a generated one."""
    if GENERATED.encode() not in card:
        return False
    published = Path(HfApi().hf_hub_download(repo_id, "README.md", revision=commit))
    content = published.read_text(encoding="utf-8-sig", errors="replace")
    # one with a header alone is the Hub's
    return GENERATED not in content and bool(ModelCard(content, ignore_metadata_errors=True).text.strip())


def push_folder(
    model: str | Path,
    repo_id: str,
    private: bool | None = None,
    encoder_repo_id: str | None = None,
    *,
    revision: str | None = None,
) -> PushReport:
    """Publish a run folder, a converted model, a depth model, or an encoder folder, with a card.

    push_folder("RUN", "user/simipu-kitti", encoder_repo_id="user/resnet50-simipu-kitti")

    The repository of a SimIPU model holds the model as remote code at its root and the image encoder as a plain timm
    folder in `image_encoder/`. Weights are safetensors only; texts are published without tokens and without the
    folders of this machine.

    Args:
        model: the folder; of a run without a final model, its newest complete checkpoint is published.
        repo_id: `user/name`; created if it does not exist.
        private: of a repository that is created; `None` leaves it to the account's setting.
        encoder_repo_id: also publish the image encoder as a repository of its own, for RGB images.
        revision: branch; `main` if `None`.

    Raises:
        SimIPUError: no complete model in the folder, or the upload failed; the message says why.
    """
    if not Path(model).is_dir():
        raise SimIPUError(f"{model}: no such folder")
    if encoder_repo_id == repo_id:
        raise SimIPUError(f"--encoder_repo_id {encoder_repo_id}: the encoder would replace the model there")
    folder = model_folder(model)
    staged = _snapshot(folder, run_of(folder))
    try:
        _complete(staged, repo_id, encoder_repo_id)
        report = _upload(repo_id, _files(staged), "Upload model", private, revision)
        if encoder_repo_id is not None:
            alone = staged / "rgb"
            write_timm(find_image_encoder(folder).with_channel_order("rgb"), alone)
            for name in RECORDS:
                if (staged / name).is_file():
                    shutil.copyfile(staged / name, alone / name)
            _complete(alone, encoder_repo_id)
            try:
                encoder = _upload(encoder_repo_id, _files(alone), "Upload image encoder", private, revision)
            except SimIPUError as error:
                raise SimIPUError(f"{report.url} was published; {error}") from error
            report.encoder_url = encoder.url
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return report


class HubUploader:
    """Publishes a run while it trains, as its flags say, in the background; never raises into the training loop.

    Create one on the main process, call [`checkpoint_saved`] after each checkpoint and [`finish`] after the final
    folder is written. A checkpoint that is written while an upload still runs is skipped, as the next one follows.

    Its strategies are named as transformers' Trainer names them: `"end"` publishes the final model; `"every_save"`
    also each checkpoint, at the repository's root; `"checkpoint"` also what resumes the run, in `last-checkpoint/`.
    """

    def __init__(self, arguments: RunArguments) -> None:
        self.repo_id, self.private = str(arguments.hub_model_id), arguments.hub_private_repo or None
        self.output_dir, self.strategy = Path(arguments.output_dir), arguments.hub_strategy
        self.encoder_repo_id: str | None = getattr(arguments, "encoder_repo_id", None)
        self.running: Future[None] | None = None
        self.pending: str | None = None  # the newest checkpoint, until it is published or its failure reported
        self._remove_staged()

    def __enter__(self) -> "HubUploader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Where an error or a signal ends the run, give a running upload a little time, and say what it left out."""
        if kind is None or self.running is None:
            return
        if not self.running.done() and kind is not KeyboardInterrupt:
            tqdm.write(f"Hub: waiting up to {LAST_WAIT} s for an upload")
            with suppress(KeyboardInterrupt):
                wait_for([self.running], LAST_WAIT)
        left_out = self.pending  # once: the upload may fail meanwhile
        if left_out is not None:
            self._remove_staged()
            tqdm.write(
                f"Hub: {left_out} was not published before the run ended; publish it with\n"
                f"  {self._command(self.output_dir / left_out)}"
            )

    def checkpoint_saved(self, checkpoint: Path) -> None:
        """Start publishing a complete checkpoint, unless the strategy is another or an upload still runs."""
        if self.strategy == "end":
            return
        self.pending = checkpoint.name
        if self.running is not None and not self.running.done():
            return
        try:
            staged = _snapshot(checkpoint, self.output_dir, self.strategy == "checkpoint")
        except (OSError, SimIPUError) as error:
            tqdm.write(f"Hub: {checkpoint.name} was not published: {error}")
            self.pending = None
        else:
            self.running = _in_background(lambda: self._publish(staged, checkpoint.name))

    def finish(self) -> None:
        """Wait for the background and publish the final folder, or report why that failed."""
        if self.running is not None:
            self.running.result()
        try:
            tqdm.write(f"Hub: {push_folder(self.output_dir, self.repo_id, self.private, self.encoder_repo_id)}")
        except Exception as error:
            encoder = f" --encoder_repo_id {self.encoder_repo_id}" if self.encoder_repo_id else ""
            tqdm.write(
                f"Hub: not everything was published: {error}\nIt is in {self.output_dir}; publish it later with\n"
                f"  {self._command(self.output_dir)}{encoder}"
            )

    def _command(self, folder: Path) -> str:
        private = " --private" if self.private else ""
        return f"simipu-hf push --model {folder} --repo_id {self.repo_id}{private}"

    def _publish(self, staged: Path, name: str) -> None:
        try:
            _complete(staged, self.repo_id)
            report = _upload(self.repo_id, _files(staged), f"Training in progress, {name}", self.private)
            tqdm.write(f"Hub: published {name} as {self.repo_id} ({report.commit[:8]})")
        except Exception as error:  # whatever it is, training goes on
            if staged.exists():  # else the run has ended, and has said so
                tqdm.write(f"Hub: {name} was not published: {error}")
        finally:
            self.pending = None if self.pending == name else self.pending
            shutil.rmtree(staged, ignore_errors=True)

    def _remove_staged(self) -> None:
        for leftover in self.output_dir.glob(f"{STAGED}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def push_dataset(
    data: str | Path,
    repo_id: str,
    private: bool | None = None,
    license: str | None = None,
) -> PushReport:
    """Publish a folder of Parquet files as a data set, with a card, in the place of an earlier version of its splits.

    Args:
        data: the folder, as `simipu-hf data convert --to parquet` writes it. A README.md in it that somebody wrote is
            kept; only the licence is written into its header.
        repo_id: `user/name`.
        private: `None` means private unless `license`, or a README.md that somebody wrote, names other terms than
            KITTI's.
        license: the Hub's name of the rows' licence, such as `"cc-by-4.0"`; `None` takes that of the folder's
            README.md, and without one KITTI's terms (CC BY-NC-SA 3.0), of which the card and the output warn.

    Raises:
        SimIPUError: no Parquet files, a README.md whose header cannot be read, a repository that holds other splits,
            or the upload failed.
    """
    folder = Path(data)
    found = ((file.relative_to(folder), file) for file in sorted(folder.rglob("*.parquet")))
    files = {name.as_posix(): file for name, file in found if not any(part.startswith(".") for part in name.parts)}
    if not files:
        raise SimIPUError(f"{folder}: expected a folder of Parquet files, found none")
    splits: dict[str, int] = {}
    for file in files.values():
        split = split_of(file.name)
        try:
            metadata = pyarrow.parquet.read_metadata(file)
            splits[split] = splits.get(split, 0) + metadata.num_rows
        except (OSError, ValueError) as error:
            raise SimIPUError(f"{file}: this Parquet file cannot be read: {error}") from error
        if _without_images(metadata):
            raise SimIPUError(
                f"{file}: expected image files, found paths of this machine, which nobody else can read: write the "
                "rows with simipu-hf data convert"
            )
    own_card = folder / "README.md"
    try:
        own = DatasetCard.load(own_card) if own_card.is_file() else None
    except (ValueError, yaml.YAMLError) as error:
        raise SimIPUError(f"{own_card}: its header between --- lines cannot be read: {error}") from error
    edited = own if own is not None and own.text.strip() and GENERATED not in own.content else None
    named = own.data.license if own and own.data.license != KITTI_LICENSE else None
    if license is None and not (edited and named):
        terms = license_of(str(folder)) if named else "treated as KITTI's, CC BY-NC-SA 3.0, same terms"
        private = True if private is None else private
        tqdm.write(
            f"Licence of these rows: {terms}. They go to a {'private' if private else 'PUBLIC'} repository. "
            "For other data name their --license.",
            file=sys.stderr,
        )
    license = license or named
    if edited:
        edited.data.license = license or KITTI_LICENSE
        card = str(edited)
    else:
        card = dataset_card(repo_id, license, splits, own.data if own else None)
    uploaded: Files = {**files, "README.md": card.encode("utf-8")}
    return _upload(repo_id, uploaded, "Upload data set", private, repo_type="dataset")


def split_of(file: str) -> str:
    """The split that a Parquet file is named for; older versions of datasets put a hash behind the shard's number."""
    return re.sub(r"(-\d+-of-\d+(-[0-9a-f]+)?)?\.parquet$", "", file)


def _without_images(metadata: Any) -> bool:
    """Whether a Parquet file has images without bytes."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    found = [column.statistics for column in columns if column.path_in_schema == "image.bytes"]
    return any(statistics is not None and statistics.null_count for statistics in found)


def _in_background(action: Callable[[], Result]) -> "Future[Result]":
    """As `HfApi.run_as_future`, but a process does not wait for it at its end: an upload that hangs holds nothing."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=MAY_HANG).start()
    return future


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status < 500 and status not in (408, 409, 412, 429)  # 409, 412: another commit came first
    return isinstance(error, (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, SimIPUError))


def _snapshot(folder: Path, run: Path, resumable: bool = False) -> Path:
    """What may be published of `folder`, in a hidden folder of `run`: whatever happens to the originals meanwhile.

    Raises:
        SimIPUError: no model, one whose weights cannot be read, or a file that cannot be copied or is no text.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise SimIPUError(f"{folder}: expected a model's config.json and safetensors weights, found none")
    for file in weights:
        read_safetensors(file, prefix="\0")  # reads the header and the file's length, no tensor
    public = list(_public_files(folder))
    files = {file.relative_to(folder): file for file in public}
    files = {Path(name): run / name for name in RECORDS if _is_own(run / name, run)} | files
    if resumable:
        last = [*public, *(file for file in folder.iterdir() if RESUME.fullmatch(file.name))]
        files |= {Path("last-checkpoint") / file.relative_to(folder): file for file in last}
    staged = _staging_folder(run)
    try:
        for name, file in files.items():
            _place(file, staged / name)
            if file.suffix in TEXT:
                (staged / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise SimIPUError(f"{file}: cannot be published: {error}") from error
    return staged


def _public_files(folder: Path) -> Iterator[Path]:
    """What is published of a folder. Pictures of a fine-tuned model are photographs of its test frames, and stay."""
    fine_tuned = "simipu_" in str(read_json(folder / "config.json").get("model_type"))
    for sub in ("", "image_encoder", *(() if fine_tuned else ("pictures",))):
        for file in sorted((folder / sub).glob("[!.]*")):
            if _is_own(file, folder) and file.suffix in PUBLIC and not RESUME.fullmatch(file.name):
                yield file


def _is_own(file: Path, folder: Path) -> bool:
    """Whether a file is there; in a folder of somebody else a text that is a link may be any file of this machine.

    Raises:
        SimIPUError: it is a link out of the folder; those in the Hub's cache lead to its blobs.
    """
    target = file.resolve()
    is_inside = target.is_relative_to(folder.resolve()) or target.parent.name == "blobs"
    if file.suffix in TEXT and not is_inside:
        raise SimIPUError(f"{file}: a link out of {folder} is not published: put the file itself there, or remove it")
    return file.is_file()


def _staging_folder(near: Path) -> Path:
    """A new hidden folder in `near`, on whose disk its files can be linked; elsewhere where `near` is read-only."""
    try:
        return Path(tempfile.mkdtemp(prefix=STAGED, dir=near))
    except OSError:
        return Path(tempfile.mkdtemp(prefix=STAGED))


def _files(staged: Path) -> Files:
    """What was staged; texts without what is nobody's business."""
    files: dict[str, Path | bytes] = {}
    for file in sorted(file for file in staged.rglob("*") if file.is_file()):
        name = file.relative_to(staged).as_posix()
        # what resumes a run is compared byte by byte with its manifest; metrics are names and numbers, by the megabyte
        as_it_is = file.name == METRICS_FILE or name.startswith("last-checkpoint/") or file.suffix not in TEXT
        files[name] = file if as_it_is else redact(file.read_text(encoding="utf-8")).encode("utf-8")
    return files


def _place(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in (".safetensors", ".pt", ".pth"):  # never changed in place: a link is a snapshot
        try:
            return target.hardlink_to(file.resolve())  # of a link to a file, such as in the Hub's cache, the file
        except OSError:
            pass
    shutil.copyfile(file, target)


def _complete(staged: Path, repo_id: str, encoder_repo_id: str | None = None) -> None:
    """Add to a snapshot what its folder may lack, encoder and card."""
    if "image_config" in read_json(staged / "config.json") and not (staged / "image_encoder").exists():
        write_timm(find_image_encoder(staged), staged / "image_encoder")
    write_model_card(staged, repo_id, encoder_repo_id)
