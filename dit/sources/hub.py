"""Source `hub`: an image–caption data set from the Hugging Face Hub, or one in its formats in a local folder.

It is streamed: the first `num_samples` rows of the split, in the data set's own order, and nothing that comes after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dit.config import HubData, Runtime
from dit.dataset.decode import check_image, image_format
from dit.dataset.filters import check_captions, clean_caption
from dit.errors import UserError, http_status, one_line
from dit.sources.folder import project_path
from dit.sources.writer import DatasetWriter, FetchResult

LOGIN = "if it is private or gated, accept its conditions and log in with `hf auth login`, or set HF_TOKEN"


def fetch(data: HubData, folder: Path, runtime: Runtime) -> FetchResult:
    """Stream `data.num_samples` images and their captions into `folder`, the bytes as they come."""
    result = FetchResult()
    writer = DatasetWriter(folder, data, data.num_samples)
    rows = 0
    for number, row in enumerate(tqdm(_rows(data), total=data.num_samples, desc="download", unit="image")):
        rows += 1
        content = row[data.image_column]
        captions, problem = _read_captions(row, data)
        problem = check_image(content) or problem or check_captions(captions)
        if problem:
            result.reject(f"row {number}", problem)
            continue
        writer.add(f"images/{number:08d}.{image_format(content)}", content, captions)
    if rows < data.num_samples:
        raise UserError(f"hub.data.num_samples: {data.num_samples} images wanted, split {data.split!r} has {rows}")
    return writer.close(result)


def local_folder(dataset: str) -> Path | None:
    """Return the folder that `hub.data.dataset` names; None if it is an id of the Hub, as it is where there is no such folder."""
    path = project_path(dataset)
    return path if path.is_dir() else None


def open_stream(data: HubData) -> Any:
    """Open the split as a `datasets.IterableDataset`, of which nothing has been read yet.

    Raises:
        UserError: it is not to be had, or has no such configuration, split or column; one line that lists which there are.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("hub.data.source: needs the library datasets; pip install -c constraints.txt -e '.[hub]'") from None
    known = f"hub.data.dataset: {data.dataset!r}"
    try:
        name = str(local_folder(data.dataset) or data.dataset)
        stream = datasets.load_dataset(name, name=data.config, revision=data.revision, split=data.split, streaming=True)
        columns = stream.column_names or list(next(iter(stream), {}))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{known} is not to be had ({one_line(error, with_type=True)}); check the id and the revision; {LOGIN}"
        ) from None
    except datasets.exceptions.DataFilesNotFoundError:
        raise UserError(f"{known} holds no files of a known format; Parquet or a folder of images would be right") from None
    except (ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{known} cannot be reached ({one_line(error, with_type=True)}); check your network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from None
    except ValueError as error:
        key = "config" if "config" in str(error).lower() else "split"
        raise UserError(f"hub.data.{key}: {getattr(data, key)!r}: {one_line(error, with_type=True)}") from None
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError) as error:
        if status := http_status(error):
            advice = LOGIN if status in (401, 403) else "try again later"
            raise UserError(f"{known} is not to be had: the Hub answers {status}; {advice}") from None
        raise UserError(f"{known} cannot be read ({one_line(error, with_type=True)}); check the id and your network") from None
    for key, column in (("image_column", data.image_column), *(("caption_columns", name) for name in data.caption_columns)):
        if column not in columns:
            raise UserError(f"hub.data.{key}: {column!r}: no such column; {data.dataset} has {', '.join(columns)}")
    kind = (stream.features or {}).get(data.image_column)
    if isinstance(kind, datasets.Value) and "binary" not in kind.dtype:
        raise UserError(f"hub.data.image_column: {data.image_column!r} holds {kind.dtype}, and images are needed")
    return stream.cast_column(data.image_column, datasets.Image(decode=False))


def _rows(data: HubData) -> Iterator[dict[str, Any]]:
    """Yield the first rows, each with its image's bytes; whatever cannot be read is a `UserError`."""
    count = 0
    try:
        for row in islice(open_stream(data), data.num_samples):
            yield row | {data.image_column: _read_image(row[data.image_column])}
            count += 1
    except UserError:
        raise
    except Exception as error:  # whatever a reader of a foreign format raises
        raise UserError(
            f"hub.data.dataset: {data.dataset!r} breaks off after {count} rows ({one_line(error, with_type=True)}); "
            "run again, or lower hub.data.num_samples"
        ) from None


def _read_image(value: Any) -> bytes:
    """Return the bytes of an image, which are in the row or in a file that it names; none if it holds neither."""
    if not isinstance(value, dict):
        return b""
    if value.get("bytes") is not None:
        return value["bytes"]
    if not value.get("path"):
        return b""
    import fsspec  # comes with datasets, and opens hf:// addresses, too

    with fsspec.open(value["path"], "rb") as file:
        return file.read()


def _read_captions(row: dict[str, Any], data: HubData) -> tuple[list[str], str | None]:
    """Return all captions of a row, and what is wrong with them, if anything."""
    captions = []
    for column in data.caption_columns:
        texts = row[column] if isinstance(row[column], list) else [row[column]]
        if not all(isinstance(text, str) or text is None for text in texts):
            return [], f"column {column!r} holds no text"
        captions += [clean_caption(text) for text in texts if text and clean_caption(text)]
    return captions, None
