"""The pages are true: their commands and examples run, their links hold, their tables are complete.

Every fenced `sh` block of README.md and docs/ is run, page by page and in order, in one scratch directory, with overrides
appended that make networks' training last two steps (SHRINK). A block that cannot run here says why in a comment above it,
`<!-- needs: cluster -->`, one of NEEDS; it is still parsed: keys, options and verbs that do not exist are refused. A fenced
`python` or `yaml` block with title="path" is written there, any other `python` block is run.
"""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import IO, Any, NamedTuple

import browser
import pytest
from tiny import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {
    "install": "changes what is installed",
    "network": "reaches beyond this machine",
    "weights": "published weights or data that have to be fetched first",
    "gpu": "hours on a GPU or more",
    "cluster": "several machines, or SLURM",
    "person": "waits for somebody to look at it",
}
_SCORED = ["n=8", "batch_size=8", "pictures=4", "sampling.steps=2", "log=false", "reference_cache=cache"]
SHRINK = {  # appended; the last of equal keys wins
    "train.py": ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "data.batch_size=4",
                 "data.val_samples=8", "data.val_batch_size=8", "sampling.steps=2", "callbacks.pictures.count=2",
                 "callbacks.progress=null", "trainer.enable_progress_bar=false", "logger=none"],
    "evaluate.py": _SCORED,
    "ldm evaluate": _SCORED,
    "python -m ldm.data.shapes": ["--train=192", "--val=16"],
    "ldm sample": ["--steps=2", "--count=2"],
}  # fmt: skip


class Block(NamedTuple):
    """A fenced block. line: of its first line in the page; needs: of the marker above it."""

    page: str
    line: int
    language: str
    title: str | None
    needs: str | None
    text: str


class Command(NamedTuple):
    """As it is typed, after NAME=value words that set the environment."""

    environment: dict[str, str]
    words: list[str]

    @property
    def program(self) -> str:
        """train.py, `ldm sample`, `python -m ldm.data.shapes`, make ..."""
        if self.words[0] == "ldm":
            return " ".join(self.words[:2])
        if self.words[0] == "python":
            return self.words[1] if self.words[1] != "-m" else " ".join(self.words[:3])
        return self.words[0]


_FENCE = re.compile(
    r'(?:<!-- needs: (?P<needs>[^\n]*?) -->\n+)?^(?P<indent> *)```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n'
    r"(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        line = text[: match.start("language")].count("\n") + 1
        body = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        found.append(Block(page.name, line, match["language"], match["title"], match["needs"], body))
    return found


def commands(block: Block) -> list[Command]:
    """One a line; a backslash at the end of a line joins the next, # begins a comment."""
    out = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        environment = {}
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, environment[name] = words.pop(0).partition("=")
        if words:
            out.append(Command(environment, words))
    return out


def shrunk(command: Command) -> list[str]:
    words = list(command.words)
    for program, overrides in SHRINK.items():
        if command.program == program and "--cfg" not in words:
            words += [each for each in overrides if each != "logger=none" or "logger=none" not in words]
    if "callbacks=[latent_diffusion,power_ema]" in words:
        words.append("callbacks.power_ema.every=1")
    return words


class Workplace:
    """A scratch directory with the programs in it, and a process that runs commands there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("ldm", "configs", "train.py", "evaluate.py", "slurm", "bench"):
            if (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
                )  # others write there
            else:
                shutil.copy(ROOT / name, folder / name)
        environment = os.environ | {"PYTHONPATH": str(folder), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
        self.log = folder / "log"
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       cwd=folder, env=environment)  # fmt: skip

    def run(self, words: list[str], environment: dict[str, str] | None = None, code: str | None = None) -> None:
        """A command, or Python code. Fails with its output where it fails."""
        request = {"words": words, "environment": environment or {}, "code": code, "log": str(self.log)}
        _pipe(self.server.stdin).write(json.dumps(request) + "\n")
        _pipe(self.server.stdin).flush()
        answer = _pipe(self.server.stdout).readline().strip()
        assert answer == "0", f"{shlex.join(words) or code}: exit code {answer}\n{self.log.read_text()[-3000:]}"

    def close(self) -> None:
        _pipe(self.server.stdin).close()
        self.server.wait(30)


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """With what README.md makes first: shapes, the demo's two runs; and with a person's pictures."""
    place = Workplace(tmp_path_factory.mktemp("docs"))
    with contextlib.closing(place):
        place.run(["python", "-m", "ldm.data.shapes", "my_pictures", "--pictures", "200", "--side", "64"])
        place.run(["ldm", "shards", "make", "my_pictures", "data/mine", "--shard-size", "50"])
        shapes = "from ldm.data import shapes; shapes.SHARD_SIZE = 16; shapes.write('data/shapes', train=192, val=16)"
        place.run([], code=shapes)
        for experiment in ("demo_autoencoder", "demo"):
            place.run(shrunk(Command({}, ["python", "train.py", f"experiment={experiment}"])))
        yield place


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs(page: Path, workplace: Workplace):
    for block in blocks(page):
        if block.title is not None:
            path = workplace.folder / block.title
            assert path.parent.is_dir(), f"{page.name}:{block.line}: {block.title} is in no directory of the repository"
            path.write_text(block.text)
        elif block.language == "python":
            workplace.run([], code=block.text)
        elif block.language == "sh" and block.needs is None:
            for command in commands(block):
                workplace.run(shrunk(command), command.environment)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_cannot_run_here_says_why_and_is_parsed(page: Path):
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.language in ("sh", "python", "yaml", "text", "json"), f"{where}: a block of {block.language}"
        if block.language != "sh":
            assert block.needs is None, f"{where}: only commands need something"
            continue
        assert block.needs is None or block.needs in NEEDS, f"{where}: needs {block.needs}, which is none of {[*NEEDS]}"
        for command in commands(block):
            known = command.words[0] in ("python", "ldm")
            assert known or block.needs, f"{where}: {command.words[0]} is run by no test; say what it needs"
            if block.needs:
                parse(command, where)


def parse(command: Command, where: str) -> None:
    """Refuses keys, options and verbs that do not exist."""
    from hydra.core.global_hydra import GlobalHydra

    from ldm import cli, config

    if command.words[0] == "ldm":
        import typer

        group, name, rest = typer.main.get_command(cli.app), "ldm", command.words[1:]
        while hasattr(group, "resolve_command"):
            context = group.make_context(name, rest, resilient_parsing=True)
            name, group, rest = group.resolve_command(context, rest)
        group.make_context(name, list(rest))
    elif "train.py" in command.words or "slurm/train.sbatch" in command.words:
        program = "train.py" if "train.py" in command.words else "slurm/train.sbatch"
        overrides = command.words[command.words.index(program) + 1 :]
        GlobalHydra.instance().clear()
        overrides = [config.quote_ranges(each) for each in overrides if not each.startswith("--")]
        overrides = [re.sub("^init_from=", "++init_from=", each) for each in overrides]  # that run need not be here
        try:
            config.compose(*overrides)
        except Exception as error:
            raise AssertionError(f"{where}: {config.explain(error)}") from error


def test_the_table_of_files_is_complete():
    """Every file that it names is there, under its heading's directory; every file of the library is named."""
    folder, named = Path(), set()
    for row in re.findall(
        r"^\| (.+?) \|", (ROOT / "docs" / "house.md").read_text().partition("## The files")[2], re.MULTILINE
    ):
        names = re.findall(r"`([^`]+)`", row)
        if row.startswith("**"):
            folder = Path(names[0])
            assert (ROOT / folder).is_dir(), f"there is no {folder}"
            continue
        for name in names:
            path = folder / name if (ROOT / folder / name).exists() else Path(name)
            assert (ROOT / path).exists(), f"docs/house.md names {name}, which is not in {folder}/"
            named.add(path)
    library = {path.relative_to(ROOT) for path in (ROOT / "ldm").rglob("*.py") if path.stem != "__init__"}
    folders = {path for path in named if (ROOT / path).is_dir()}
    missing = [path for path in library - named if not folders & {*path.parents}]
    assert sorted(map(str, missing)) == [], "docs/house.md does not name them"


def test_the_tables_of_choices_are_complete():
    """Each row of docs/choices.md that begins with a group names all of its options, and none that is not there."""
    rows = re.findall(r"^\| `([\w/]+)` \| (.*) \|$", (ROOT / "docs" / "choices.md").read_text(), re.MULTILINE)
    assert len(rows) >= 12
    for group, text in rows:
        options = {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")}
        named = set(re.findall(r"`(\w+)`", text))
        assert options <= named, f"docs/choices.md does not name {sorted(options - named)} of {group}"
        assert named - options <= {"features"}, f"docs/choices.md: {group} has no {sorted(named - options)}"


def test_every_verb_is_told_of():
    import typer

    from ldm import cli

    def verbs(group: Any, words: str) -> Iterator[str]:
        for name, command in group.commands.items():
            yield from verbs(command, f"{words} {name}") if hasattr(command, "commands") else [f"{words} {name}"]

    text = (ROOT / "docs" / "tools.md").read_text()
    assert [verb for verb in verbs(typer.main.get_command(cli.app), "ldm") if f"`{verb}`" not in text] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a link that leads nowhere fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.slow
def test_the_site_asks_nobody_for_anything(site: Path):
    """No script, style, font or picture of another host."""
    assert {page.stem for page in site.glob("*.html")} >= {page.stem for page in PAGES[1:]}
    for page in site.glob("*.html"):
        assets = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"?([^\" >]+)", page.read_text())
        assets += re.findall(r"<link[^>]* rel=\"?(?:stylesheet|preconnect|icon)\"?[^>]*", page.read_text())
        assert assets
        assert [each for each in assets if re.search(r"(https?:)?//", each)] == [], page.name


@pytest.mark.slow
@browser.needs_browser
def test_the_pages_are_read_without_scrolling_sideways(site: Path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server,
        browser.tab(browser.PHONE) as tab,
    ):
        Thread(target=server.serve_forever, daemon=True).start()
        for width in (browser.PHONE, browser.DESKTOP):
            tab.page.set_viewport_size({"width": width, "height": 900})
            for page in PAGES[1:]:
                tab.page.goto(f"http://127.0.0.1:{server.server_port}/{page.stem}.html")
                assert tab.overflow() == 0, f"{page.name} at {width} px"
        server.shutdown()
    problems = [problem for problem in tab.problems if "ERR_ABORTED" not in problem]  # left while it was loading
    assert (problems, tab.elsewhere()) == ([], [])


def serve() -> None:
    """Runs what stdin asks for, a line of JSON each, in forks of this process, which has imported everything."""
    import torch
    from torch import distributed  # noqa: F401

    import ldm.cli
    import ldm.config
    import ldm.data.audit
    import ldm.data.datamodule
    import ldm.evaluation.metrics
    import ldm.evaluation.scoring
    import ldm.training.autoencoder
    import ldm.training.callbacks
    import ldm.training.checkpointing
    import ldm.training.faults
    import ldm.training.latent_diffusion
    import ldm.training.throughput  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_answer(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _answer(request: dict[str, Any]) -> int:
    file = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ |= request["environment"]
    sys.path[0] = os.getcwd()
    words = request["words"]
    try:
        if request["code"] is not None:
            exec(compile(request["code"], "<page>", "exec"), {"__name__": "__main__"})
        elif words[:2] == ["python", "-m"]:
            sys.argv = words[2:]
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        elif words[0] == "python":
            sys.argv = words[1:]
            runpy.run_path(words[1], run_name="__main__")
        else:
            from ldm import cli

            sys.argv = words
            cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
