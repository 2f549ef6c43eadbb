"""A ComfyUI server over HTTP: queue workflows, fetch what they made, send files; what can go wrong, in words."""

from __future__ import annotations

import io
import json
import secrets
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from . import saved_files

LOOK = 5.0  # seconds between two looks into the queue, which may hold much

BROKEN = (urllib.error.URLError, ConnectionError, TimeoutError, HTTPException)  # what ends a request on the way; a full disk does not

# A proxy from the environment must not see requests to this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """A server did not do what it was asked; the message says what, and what to do."""


class ServerStartError(ServerError):
    """ComfyUI did not come up; the message holds its last words."""


class ServerGoneError(ServerError):
    """A server does not answer, or not any more."""


class PromptError(ServerError):
    """A workflow did not run. `body` is the server's own answer."""

    def __init__(self, message: str, body: Any):
        super().__init__(message)
        self.body = body


class PromptRefusedError(PromptError):
    """The server did not accept the workflow, or (status 200) not all of its output nodes.

    status: of HTTP. kind: ComfyUI's word for what is wrong with the workflow as a whole, or "".
    """

    def __init__(self, status: int, body: Any):
        super().__init__(_describe_refusal(status, body), body)
        self.status = status
        self.kind = body["error"].get("type", "") if isinstance(body, dict) and isinstance(body.get("error"), dict) else ""


class PromptLostError(PromptError):
    """The server does not know the workflow any more."""


class PromptFailedError(PromptError):
    """A node raised an error while the workflow ran."""


class PromptInterruptedError(PromptError):
    """The workflow was interrupted."""


class PromptEmptyError(PromptError):
    """The workflow ran, and output nodes reported nothing; `result` has what the others did."""

    def __init__(self, workflow: Mapping[str, Any], result: PromptResult):
        names = ", ".join(f"{workflow[node]['class_type']} (node {node})" for node in result.silent)
        super().__init__(f"{names} reported no file and no text; look whether what is connected there is empty or switched off", None)
        self.result = result


class UploadError(ServerError):
    """A server did not take a file."""


@dataclass(frozen=True)
class PromptResult:
    """outputs: what each output node reported, `{node id: {"images": [...], "text": [...], ...}}`. seconds: as the server measured it.

    silent: output nodes that ran, or were meant to, and reported nothing. A few write files without a word, such as core's Save Checkpoint.
    """

    outputs: dict[str, dict[str, Any]]
    seconds: float
    silent: tuple[str, ...] = ()


class ComfyClient:
    """A running ComfyUI server, named by its address: "http://host:8188", or "host:8188". Raises ValueError for what is no address."""

    def __init__(self, url: str):
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self.system: dict[str, Any] = {}
        self._name = secrets.token_hex(16)
        try:
            address = urllib.parse.urlsplit(self.url)
        except ValueError:
            address = urllib.parse.urlsplit("")
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"{url!r} is no address of a server; write one such as http://127.0.0.1:8188")
        local = address.hostname in ("127.0.0.1", "localhost", "::1")
        self._opener = _OPENER if local else urllib.request.build_opener()

    @property
    def version(self) -> str:
        """ComfyUI's own version."""
        return str(self.system["system"]["comfyui_version"])

    def run(self, workflow: Mapping[str, Any], *, targets: Sequence[str] | None = None, timeout: float = 3600.0) -> PromptResult:
        """Queue an API-format workflow and wait for its end.

        Raises a PromptError when it is refused, in whole or in part, fails, is interrupted, or when an output node reports nothing.
        """
        result = self.wait(self.queue(workflow, targets), timeout)
        if result.silent:
            raise PromptEmptyError(workflow, result)
        return result

    def queue(self, workflow: Mapping[str, Any], targets: Sequence[str] | None = None) -> str:
        """Queue a workflow; returns its prompt id. targets: run only these output nodes and what they need.

        Raises PromptRefusedError with the server's error body, also when it would run the rest of the workflow without some output nodes.
        """
        # Older servers tell what a node reported, if its result is one of an earlier run, only where they know for whom.
        request = {"prompt": workflow, "client_id": self._name, **({} if targets is None else {"partial_execution_targets": list(targets)})}
        status, body = self._request("/prompt", request)
        if status != 200 or not isinstance(body, dict):
            raise PromptRefusedError(status, body)
        if body.get("node_errors"):
            self.cancel(body["prompt_id"])
            raise PromptRefusedError(status, body)
        return str(body["prompt_id"])

    def wait(self, prompt_id: str, timeout: float = 3600.0) -> PromptResult:
        """Wait for the end of a queued prompt. Raises PromptLostError where the server does not know it any more."""
        deadline = time.monotonic() + timeout
        look = time.monotonic() + LOOK
        while True:
            known = True
            if time.monotonic() > look:  # before the history is read: what ends in between is in there
                known, look = self._is_queued(prompt_id), time.monotonic() + LOOK
            _, history = self._request(f"/history/{prompt_id}")
            if prompt_id in history:
                return _result(history[prompt_id])
            if not known:
                raise PromptLostError(f"{self.url} does not know the workflow any more: it was started anew, or its queue was emptied", history)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the workflow did not end within {timeout:.0f} s{self._last_words()}")
            time.sleep(0.1)

    def interrupt(self) -> None:
        """Stop the running workflow; its `wait` raises PromptInterruptedError."""
        self._request("/interrupt", {})

    def cancel(self, prompt_id: str) -> None:
        """Take one prompt out of the queue, or stop it if it runs; other people's prompts go on."""
        self._request("/queue", {"delete": [prompt_id]})
        self._request("/interrupt", {"prompt_id": prompt_id})

    def settle(self, prompt_id: str, patience: float) -> dict[str, dict[str, Any]]:
        """Stop a prompt that has not ended, and wait `patience` seconds for its end; what its finished nodes reported, {} where nobody knows."""
        deadline = time.monotonic() + patience
        try:
            self.cancel(prompt_id)
            while True:
                queued = self._is_queued(prompt_id)  # before the history is read, as in `wait`
                _, history = self._request(f"/history/{prompt_id}")
                if prompt_id in history:
                    outputs: dict[str, dict[str, Any]] = history[prompt_id]["outputs"]
                    return outputs
                if not queued or time.monotonic() > deadline:
                    return {}
                time.sleep(0.1)
        except ServerError:
            return {}

    def is_running(self, prompt_id: str) -> bool:
        """Whether a queued prompt is being executed now."""
        _, queue = self._request("/queue")
        return any(entry[1] == prompt_id for entry in queue["queue_running"])

    def _is_queued(self, prompt_id: str) -> bool:
        queue = self.get("/queue")
        return any(entry[1] == prompt_id for entry in queue["queue_running"] + queue["queue_pending"])

    def get(self, route: str) -> Any:
        """The JSON answer of a GET request, such as "/object_info/KSampler"."""
        status, body = self._request(route)
        if status != 200:
            raise ServerError(f"GET {route} answered {status}: {body}")
        return body

    def fetch(self, file: Mapping[str, str]) -> bytes:
        """The bytes of an output file, given its entry `{"filename", "subfolder", "type"}` in a result. Raises ServerError."""
        target = io.BytesIO()
        self._download(file, target)
        return target.getvalue()

    def save(self, outputs: Mapping[str, Mapping[str, Any]], folder: Path, *, overwrite: bool = False) -> tuple[list[Path], list[str]]:
        """Fetch all files that the nodes saved (previews are not) to the same places below `folder`, under names that are free there.

        outputs: of a PromptResult. overwrite: keep the names, and replace what has them. Returns the paths, and a sentence for each file
        or folder that stays on the server.
        """
        staged = saved_files.open_staging(folder)
        reported, left = [], []
        try:
            for _, entry in saved_files.entries(outputs):
                if entry["type"] != "output":
                    continue
                try:
                    reported.append(self._save_entry(entry, staged))
                except (ServerError, ValueError) as error:
                    left.append(str(error))
        except BaseException:
            shutil.rmtree(staged)
            raise
        return saved_files.place(staged, folder, reported, overwrite=overwrite), left

    def _save_entry(self, entry: Mapping[str, Any], folder: Path) -> PurePosixPath:
        """Fetch a file, or a folder whose node told its files; returns its relative path."""
        path = saved_files.relative_path(entry)
        files = [{**entry, "subfolder": str(path), "filename": name} for name in entry["files"]] if "files" in entry else [entry]
        try:
            for each in files:
                target = folder / saved_files.relative_path(each)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    self._download(each, out)
        except (ServerError, ValueError):  # nothing of it, rather than a part
            if (folder / path).is_dir():
                shutil.rmtree(folder / path)
            (folder / path).unlink(missing_ok=True)
            raise
        return path

    def _download(self, file: Mapping[str, str], target: BinaryIO) -> None:
        place = "/".join(filter(None, (file["type"], file["subfolder"], file["filename"])))
        query = urllib.parse.urlencode({key: file[key] for key in ("filename", "subfolder", "type")})
        try:
            with self._opener.open(f"{self.url}/view?{query}", timeout=60) as answer:
                shutil.copyfileobj(answer, target)
                missing = answer.length  # of what it announced; None where it did not
        except urllib.error.HTTPError as error:
            raise ServerError(f"{place} stays on {self.url}, which gives out single files that are there ({error.code} {error.reason})") from error
        except BROKEN as error:
            raise self._gone(error) from error
        if missing:
            raise ServerGoneError(f"{self.url} sent {place} only in part; it stays there")

    def upload(self, data: bytes, file: Mapping[str, str]) -> None:
        """Write a file into one of the server's folders, over what has its name. file: as for `fetch`; type "input", "output" or "temp"."""
        boundary = secrets.token_hex(16)
        fields = {"subfolder": file["subfolder"], "type": file["type"], "overwrite": "true"}
        parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()]
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{file["filename"]}"\r\n'
        body = "".join([*parts, head, "Content-Type: application/octet-stream\r\n\r\n"]).encode() + data + f"\r\n--{boundary}--\r\n".encode()
        request = urllib.request.Request(f"{self.url}/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
        try:
            with self._opener.open(request, timeout=60):
                pass
        except urllib.error.HTTPError as error:
            hint = "; start it with a larger --max-upload-size" if error.code == 413 else ""
            raise UploadError(f"{self.url} did not take a file of {len(data) / 2**20:.0f} MiB ({error.code} {error.reason}){hint}") from error
        except BROKEN as error:
            raise self._gone(error) from error

    def answers(self) -> bool:
        """Whether it is a ComfyUI server, and up."""
        try:
            self.system = self.get("/system_stats")
        except ServerError:
            return False
        return isinstance(self.system, dict) and "system" in self.system

    def _last_words(self) -> str:
        return ""

    def _gone(self, error: Exception) -> ServerGoneError:
        reason = getattr(error, "reason", error)  # an URLError's
        text = getattr(reason, "strerror", None) or str(reason) or "it hung up"
        return ServerGoneError(f"{self.url} does not answer ({text}); look whether ComfyUI is running there, and start it again")

    def _request(self, route: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=60) as answer:
                return answer.status, _decode(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _decode(error.read())
        except BROKEN as error:
            raise self._gone(error) from error


def _decode(data: bytes) -> Any:
    try:
        return json.loads(data)
    except json.JSONDecodeError:
        return data.decode(errors="replace")


def _result(entry: Mapping[str, Any]) -> PromptResult:
    """A history entry as a result; raises what its messages say."""
    messages = {name: data for name, data in entry["status"]["messages"]}
    if "execution_error" in messages:
        error = messages["execution_error"]
        text = error["exception_message"].strip() or f"it failed without a word ({error['exception_type']})"
        raise PromptFailedError(f"{error['node_type']} (node {error['node_id']}): {text}", error)
    if "execution_interrupted" in messages:
        raise PromptInterruptedError("the workflow was interrupted", messages["execution_interrupted"])
    seconds = (messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]) / 1e3
    outputs = entry["outputs"]
    spoken = [node for node, report in outputs.items() if any(report.values())]
    # What node 3 puts in while it runs is 3.0.1 and speaks for it.
    silent = [node for node in entry["prompt"][4] if not any(other == node or other.startswith(f"{node}.") for other in spoken)]
    return PromptResult(outputs, seconds, tuple(sorted(silent)))


# What ComfyUI says of a whole workflow, where that does not say what to do.
REMEDIES = {
    "prompt_no_outputs": "the workflow has no output node, so nothing would come of it; add one that saves or shows something",
    "prompt_outputs_failed_validation": "the workflow cannot run",
}


def _describe_refusal(status: int, body: Any) -> str:
    """The server's error body in a few lines."""
    if not isinstance(body, dict) or not (isinstance(body.get("error"), dict) or body.get("node_errors")):
        return f"ComfyUI answered {status}: {body}"
    error = body.get("error")
    if error is None:
        lines = ["ComfyUI would leave out a part of the workflow"]
    elif error.get("type") in REMEDIES:
        lines = [REMEDIES[error["type"]]]
    else:
        lines = [f"ComfyUI answered {status}: {error['message']} {error.get('details', '')}".rstrip()]
    for node, report in (body.get("node_errors") or {}).items():
        lines += [f"  {report['class_type']} (node {node}): {item['message']}: {item['details']}" for item in report["errors"]]
    return "\n".join(lines)
