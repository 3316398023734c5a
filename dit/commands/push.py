"""`dit push`: the export of a model to a repository on the Hugging Face Hub, with its card."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, get_args

from dit import __version__
from dit.commands._args import add_flag
from dit.commands.export import CARD, WRITTEN, load_to_export, write_export
from dit.config import DEFAULTS, Scheduler
from dit.errors import UserError, http_status, one_line, without_password
from dit.pipeline.model_folder import PIPELINE, read_index
from dit.utils.files import write_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Two files for diffusers' own DiffusionPipeline: it takes a class that is not its own from a file in the repository alone.
PIPELINE_FILE, TRANSFORMER_FILE = "pipeline.py", "transformer/latent_dit.py"
CODE = '''"""For diffusers' own `DiffusionPipeline.from_pretrained`: the class comes from the package latent-dit, see {card}."""

from importlib import import_module

try:  # no import statement, of which diffusers reads to install a package called dit: that is somebody else's
    {name} = import_module("dit").{name}
except ImportError:
    raise ImportError("this model needs the Python package latent-dit, as {card} in its repository says") from None

__all__ = ["{name}"]
'''
# What an earlier push may have written and this one does not goes; whatever else is in the repository stays.
REPLACED = [PIPELINE_FILE, *sorted(WRITTEN), *(f"{name}/*" for name in sorted(WRITTEN))]
EXAMPLES = """\
examples:
  dit push anna/shapes --dry-run          what would be uploaded; nothing is sent
  dit push anna/shapes                    to a private repository, which is made if it is missing
  dit push anna/shapes --public           for everybody
  dit push anna/shapes --revision v2      to a branch of it
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `push` and its flags."""
    parser = commands.add_parser(
        "push",
        help="upload the model and its encoders to the Hugging Face Hub, with its card",
        description="Upload what `dit export` writes - the whole pipeline and a model card with the evaluation - to the\n"
        "Hugging Face Hub. Log in once with `hf auth login`, or set HF_TOKEN. If it breaks off, run it again: what has\n"
        "been uploaded is not uploaded again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", metavar="OWNER/NAME", help="the repository; OWNER is you or an organization of yours")
    add_flag(
        parser, "checkpoint", type=Path, default=Path("models/dit"), metavar="FOLDER", help="the model; default: %(default)s"
    )
    add_flag(
        parser,
        "scheduler",
        choices=get_args(Scheduler),
        metavar="NAME",
        help=f"{', '.join(get_args(Scheduler))}; default: the checkpoint's, {DEFAULTS.scheduler} for what `dvc repro` trained",
    )
    add_flag(parser, "revision", metavar="BRANCH", help="a branch, which is made if it is missing; default: main")
    add_flag(parser, "public", action="store_true", help="make the repository public; otherwise it is private")
    add_flag(parser, "dry-run", action="store_true", help="list the files and their sizes, and send nothing")
    parser.set_defaults(action=push)


def push(arguments: argparse.Namespace) -> None:
    """Export into a temporary folder and upload it; print what went where, how to load it, and last of all its address."""
    from huggingface_hub import constants

    repository, branch = arguments.repository, arguments.revision
    check_repository(repository)
    read_index(arguments.checkpoint)
    api = None if arguments.dry_run else log_in()
    with exported(arguments.checkpoint, arguments.scheduler, repository) as (folder, missing):
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        if api is not None:
            visibility = upload(api, repository, folder, branch, arguments.public)
    total = f"{len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB"
    if missing:
        print(f"{CARD} is without an evaluation: {missing}")
    if api is None:
        for name in sorted(sizes):
            print(f"{sizes[name]:13,d}  {name}")
        print(f"{total}, would be uploaded to {repository}; nothing was sent")
        return
    version = f', revision="{branch}"' if branch else ""
    print(f"{repository} has it, {visibility}: {total}")
    print("load it:   from dit import DiTTextToImagePipeline")
    print(f'           pipeline = DiTTextToImagePipeline.from_pretrained("{repository}"{version})')
    flag = f" --revision {branch}" if branch else ""
    print(f'or run:    dit generate --model {repository}{flag} --prompt "a red circle above a blue star"')
    print(f"{without_password(constants.ENDPOINT)}/{repository}{f'/tree/{branch}' if branch else ''}")


def check_repository(repository: str) -> None:
    """Raise a `UserError` unless `repository` can be the id of one on the Hub, owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        problem = "" if repository.count("/") == 1 else "it has no owner"
    except HFValidationError as error:
        problem = one_line(error)
    if problem:
        raise UserError(f"push: {repository!r} is no id of a repository, OWNER/NAME would be right: {problem}")


@contextmanager
def exported(checkpoint: Path, scheduler: str | None, repository: str) -> Iterator[tuple[Path, str]]:
    """Provide a temporary folder with all that goes into the repository, and why its card is without an evaluation, or ""."""
    from safetensors import SafetensorError

    pipeline = load_to_export(checkpoint, scheduler)
    with TemporaryDirectory(prefix="dit-push-") as aside:
        folder = Path(aside) / "model"
        try:
            missing = write_export(pipeline, checkpoint, folder, repository)
            add_code(folder)
        except (OSError, SafetensorError) as error:  # the disk is full, most often
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UserError(f"push: {aside}: cannot be written: {reason}; TMPDIR names another place") from None
        yield folder, missing


def add_code(folder: Path) -> None:
    """Write the two files for diffusers' own `DiffusionPipeline`, and name the second one in model_index.json."""
    for file, name in ((PIPELINE_FILE, PIPELINE), (TRANSFORMER_FILE, "DiT")):
        (folder / file).write_text(CODE.format(name=name, card=CARD), encoding="utf-8", newline="\n")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    write_json(folder / "model_index.json", index | {"transformer": [Path(TRANSFORMER_FILE).stem, "DiT"]})


def log_in() -> HfApi:
    """Return the Hub's client, whose token the Hub has accepted.

    Raises:
        UserError: there is no token, the Hub refuses it, or it cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        raise UserError("push: HF_HUB_OFFLINE is set, so that nothing can be sent; unset it (--dry-run lists what would go)")
    if get_token() is None:
        raise UserError(f"push: you are not logged in; {_new_token()}")
    api = HfApi(library_name="latent-dit", library_version=__version__)
    with hub_errors("push"):
        api.whoami()
    return api


def upload(api: HfApi, repository: str, folder: Path, branch: str | None, public: bool) -> str:
    """Upload `folder`, files that are not there already alone; return who sees the repository: "private" or "public".

    Raises:
        UserError: the Hub refuses it, the connection broke off, or the repository is public and `public` is not.
    """
    with hub_errors(repository):
        api.create_repo(repository, private=not public, exist_ok=True)
        private = api.repo_info(repository).private
        if not (private or public):
            raise UserError(f"{repository}: is public, and everybody would see the model; --public pushes it all the same")
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=branch,
            commit_message=f"Push with latent-dit {__version__}",
            delete_patterns=REPLACED,
        )
    if public and private:
        return "private as it was before, which its settings on the Hub can change"
    return "private" if private else "public"


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn whatever goes wrong between here and the Hub into a `UserError` that begins with `what`."""
    from huggingface_hub import constants, errors

    try:
        yield
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:  # hf_xet raises the last three
        status, endpoint = http_status(error), constants.ENDPOINT
        again = "what has been uploaded is not uploaded again"
        if status == 401:
            problem = f"{endpoint} does not accept your token; {_new_token()}"
        elif status == 403:
            problem = f"your token has no right to write there; check the owner's name, or {_new_token()}"
        elif status in (408, 429) or (status or 0) >= 500:
            problem = f"{endpoint} answers {status}; run again later: {again}"
        elif status or isinstance(error, ValueError):
            problem = f"{endpoint} refuses it: {one_line(getattr(error, 'server_message', None) or error)}"
        else:
            reason = one_line(error.__cause__ or error, with_type=True)
            problem = f"the connection to {endpoint} broke off ({reason}); run again: {again}"
        raise UserError(f"{what}: {problem}") from None


def _new_token() -> str:
    from huggingface_hub import constants

    return f"make a token that may write at {constants.ENDPOINT}/settings/tokens, then `hf auth login`, or set HF_TOKEN"
