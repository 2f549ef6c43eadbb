"""Find ComfyUI, run it headless with this pack in it, stop it again.

    with ComfyServer(find_comfy()) as server:
        result = server.run(workflow)            # API format: {node id: {"class_type": ..., "inputs": {...}}}
        png = server.fetch(result.outputs["9"]["images"][0])
        files, left = server.save(result.outputs, Path("output"))

The server works in a temporary base directory: the user's own outputs, settings and custom nodes are not touched.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .comfy_client import ComfyClient, ServerGoneError, ServerStartError

PACK = Path(__file__).resolve().parent.parent
HOW_TO_GET = "set COMFYUI_PATH to a ComfyUI folder, or install one with `pip install comfy-cli && comfy install` (it goes to ~/comfy/ComfyUI)"
WORK_FOLDERS = ("input", "output", "temp", "user", "models", "custom_nodes")


@dataclass(frozen=True)
class ComfyInstall:
    """A ComfyUI folder and the Python that runs it."""

    path: Path
    python: Path


def find_comfy(path: str | os.PathLike[str] | None = None, python: str | os.PathLike[str] | None = None) -> ComfyInstall | None:
    """The ComfyUI to use, or None.

    path: else COMFYUI_PATH, else the folder above if the pack lies in its `custom_nodes`, else ~/comfy/ComfyUI.
    python: else COMFYUI_PYTHON, else the virtual environment in or beside that folder, else the running one.
    Raises FileNotFoundError when a folder was named and is not a ComfyUI.
    """
    named = path or os.environ.get("COMFYUI_PATH")
    if named:
        candidates = [Path(named).expanduser()]
    else:
        # Not resolved: where custom_nodes holds a link to the pack, the folder above the link counts.
        here = Path(os.path.abspath(__file__)).parent.parent
        candidates = [here.parent.parent] if here.parent.name == "custom_nodes" else []
        candidates.append(Path.home() / "comfy" / "ComfyUI")
    found = next((folder.resolve() for folder in candidates if (folder / "main.py").is_file() and (folder / "comfy").is_dir()), None)
    if found is None:
        if named:
            raise FileNotFoundError(f"{named} is not a ComfyUI folder: it has no main.py and comfy/")
        return None
    return ComfyInstall(found, _find_python(found, python or os.environ.get("COMFYUI_PYTHON")))


def _find_python(comfy: Path, named: str | os.PathLike[str] | None) -> Path:
    if named:
        return Path(named).expanduser()
    relative = Path("Scripts/python.exe" if os.name == "nt" else "bin/python")
    environments = (comfy / ".venv", comfy / "venv", comfy.parent / "venv", comfy.parent / ".venv")
    return next((folder / relative for folder in environments if (folder / relative).exists()), Path(sys.executable))


class ComfyServer(ComfyClient):
    """A headless ComfyUI server on a free loopback port, with this pack as its only custom node. Use as a context manager.

    models: folder of models in ComfyUI's layout (diffusion_models/, vae/, ...) to offer besides those that the pack brings.
    folder_name: name of the pack's folder inside custom_nodes; any name must do.
    custom_nodes: further node packs to link in (tests).
    arguments: further command-line arguments for ComfyUI.
    """

    def __init__(
        self,
        comfy: ComfyInstall,
        *,
        models: Path | None = None,
        folder_name: str = "tessera-nodes",
        custom_nodes: Sequence[Path] = (),
        arguments: Sequence[str] = (),
        start_timeout: float = 300.0,
    ):
        super().__init__("127.0.0.1")
        self.comfy = comfy
        self._links = {folder_name: PACK, **{folder.name: folder for folder in custom_nodes}}
        self._models = models
        self._arguments = list(arguments)
        self._start_timeout = start_timeout
        self._base: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        self._base = Path(tempfile.mkdtemp(prefix="tessera-comfy-"))
        try:
            self._start(self._base)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def log(self) -> str:
        """Everything the server printed so far."""
        assert self._base is not None
        return (self._base / "server.log").read_text(errors="replace")

    def _start(self, base: Path) -> None:
        self.system = {}
        for folder in WORK_FOLDERS:
            (base / folder).mkdir()
        for name, target in self._links.items():
            (base / "custom_nodes" / name).symlink_to(target, target_is_directory=True)
        (base / "user" / "default").mkdir()
        (base / "user" / "default" / "comfy.settings.json").write_text('{"Comfy.TutorialCompleted": true}')
        port = _free_port()
        command = [str(self.comfy.python), "main.py", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
        command += ["--database-url", f"sqlite:///{base}/user/comfyui.db", "--disable-auto-launch", *self._arguments]
        if self._models is not None:
            folders = {folder.name: folder.name for folder in self._models.iterdir() if folder.is_dir()}
            paths = base / "extra_model_paths.yaml"
            paths.write_text(json.dumps({"models": {"base_path": str(self._models), **folders}}))  # JSON is YAML
            command += ["--extra-model-paths-config", str(paths)]
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        if not _has_accelerator(self.comfy.python, environment):
            command.append("--cpu")
        with (base / "server.log").open("wb") as log:
            # A session of its own: Ctrl-C reaches this process only, which stops the server when its files are safe.
            self._process = subprocess.Popen(
                command,
                cwd=self.comfy.path,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + self._start_timeout
        while not self.answers():
            if self._process.poll() is not None:
                raise ServerStartError(f"ComfyUI at {self.comfy.path} ended while starting; its last lines:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise ServerStartError(
                    f"ComfyUI at {self.comfy.path} did not start within {self._start_timeout:.0f} s; its last lines:\n{self._tail()}"
                )
            time.sleep(0.2)

    def _stop(self) -> None:
        try:
            if self._process is not None:
                self._process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(20)
        finally:  # also when the user is impatient
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            if self._base is not None:
                shutil.rmtree(self._base, ignore_errors=True)

    def _last_words(self) -> str:
        return f"; the server's last lines:\n{self._tail()}"

    def _gone(self, error: Exception) -> ServerGoneError:
        assert self._process is not None
        if self.system:  # it was up
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)  # its connections end a little before it does
        status = self._process.returncode
        if status is None:
            return super()._gone(error)
        how = "was killed, as a rule because memory ran out: use less of it" if status == -signal.SIGKILL else f"ended (exit status {status})"
        return ServerGoneError(f"ComfyUI at {self.comfy.path} {how}{self._last_words()}")

    def _tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _has_accelerator(python: Path, environment: Mapping[str, str]) -> bool:
    """Whether that Python's torch sees a GPU; ComfyUI without --cpu refuses to start where there is none."""
    code = "import torch; raise SystemExit(0 if torch.cuda.is_available() or torch.backends.mps.is_available() else 3)"
    try:
        probe = subprocess.run([str(python), "-c", code], env=dict(environment), capture_output=True, text=True)
    except OSError as error:
        raise ServerStartError(f"{python} cannot be run ({error.strerror}); set COMFYUI_PYTHON to the Python that runs ComfyUI") from error
    if probe.returncode not in (0, 3):
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise ServerStartError(f"{python} cannot run ComfyUI: {reason}; set COMFYUI_PYTHON to the Python that runs it")
    return probe.returncode == 0
