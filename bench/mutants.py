"""Mutation testing: small faults are planted one at a time in a module, and its tests must fail for each.

    make mutants                                     all modules of MODULES: hours
    python bench/mutants.py models/patchers/report.py ...   these
    python bench/mutants.py --most 200 ...           a fixed random choice of so many faults a module
    python bench/mutants.py --again ...              those that survived the last time

cosmic-ray plants the faults, in a copy of the tracked files. torch is imported once: a server forks for each fault. Tests marked
slow take no part. Writes bench/results/mutants.json and, beside it, the table as Markdown. Survivors that cannot be killed, since they change
nothing that anybody could see, are explained in EQUIVALENT.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
RESULTS = PACK / "bench" / "results" / "mutants.json"

MODULES = {
    "models/patchers/report.py": ["test_attention_report.py"],
    "models/patchers/attention.py": ["test_attention_patch.py", "test_attention_report.py"],
    "models/patchers/settings.py": ["test_attention_patch.py"],
    "models/offload/schedule.py": ["test_offload_plan.py"],
    "kernels/sparsity/select.py": ["test_sparsity.py"],
    "kernels/sparsity/estimate.py": ["test_sparsity.py"],
    "kernels/sparsity/permute.py": ["test_sparsity.py"],
    "kernels/sparsity/plan.py": ["test_sparsity.py"],
    "kernels/sparsity/grid.py": ["test_sparsity.py"],
    "kernels/registry.py": ["test_sparsity.py", "test_families.py"],
    "kernels/backends.py": ["test_dispatch.py", "test_backends.py"],
    "kernels/dispatch.py": ["test_dispatch.py", "test_torch_backend.py"],
    "kernels/selftest.py": ["test_dispatch.py"],
    "kernels/block_mask.py": ["test_block_mask.py", "test_torch_backend.py"],
    "kernels/attention.py": ["test_torch_backend.py", "test_dispatch.py", "test_compile.py"],
    "kernels/quantize.py": ["test_quantize.py"],
    "kernels/torch_backend/block_sparse.py": ["test_torch_backend.py"],
    "kernels/torch_backend/dense.py": ["test_torch_backend.py"],
}

# Sums for differences and quotients for products are faults that people make; bits for sums are not, nor `is` for `==`, which linters find.
OPERATORS = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_Mul|Pow_Mul|BitOr_BitAnd|BitAnd_BitOr)"
    r"|ReplaceComparisonOperator_(Is|IsNot|In|NotIn)_.*|ReplaceComparisonOperator_.*_(Eq|NotEq|Lt|LtE|Gt|GtE|In|NotIn)|ReplaceUnaryOperator_.*|AddNot|Number.*|ReplaceTrueWithFalse|ReplaceFalseWithTrue"
    r"|ReplaceAndWithOr|ReplaceOrWithAnd|ReplaceBreakWithContinue|ReplaceContinueWithBreak|RemoveDecorator|ExceptionReplacer|ZeroIterationForLoop)$"
)

_SELECT = "kernels/sparsity/select.py"
_REPORT, _SCHEDULE = "models/patchers/report.py", "models/offload/schedule.py"
_LAST = "of the three outcomes SPARSE sorts last"
_STRICT = "the lengths are equal by construction"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        _REPORT,
        "if SPARSE in outcomes or outcomes == {HOST}:",
        "ReplaceComparisonOperator_Eq_LtE",
    ): "one without calls is of no other's shape",
    (_REPORT, "sparse = [record.outcome == SPARSE for record in records]", "ReplaceComparisonOperator_Eq_GtE"): _LAST,
    (
        _REPORT,
        'for value, label in ((0.0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1.0, "1 dense"), (None, "no call")):',
        "NumberReplacer",
    ): "colours end at 0 and 1",
    (_REPORT, "if record.outcome != QUANTIZED:", "ReplaceComparisonOperator_NotEq_Gt"): "of the three outcomes QUANTIZED sorts first",
    (
        _REPORT,
        "calls.setdefault(record.shape, {}).setdefault(record.outcome == SPARSE, []).append(record.seconds)",
        "ReplaceComparisonOperator_Eq_GtE",
    ): _LAST,
    (
        _REPORT,
        "call, model = ([median(times[False]) / median(times[True]) for times in groups.values() if len(times) == 2] for groups in (calls, models))",
        "ReplaceComparisonOperator_Eq_GtE",
    ): "there are two kinds",
    (
        _REPORT,
        "red, green, blue = (round(a + (b - a) * (position - low)) for a, b in zip(stops[low], stops[low + 1], strict=True))",
        "ReplaceTrueWithFalse",
    ): _STRICT,
    (
        _REPORT,
        "placed = [(record, record.layer, density) for record, density in zip(self.records, densities, strict=True) if record.layer is not None]",
        "ReplaceTrueWithFalse",
    ): _STRICT,
    (_REPORT, "total = math.fsum(weight for weight, keep in zip(weights, use, strict=True) if keep)", "ReplaceTrueWithFalse"): _STRICT,
    (
        _REPORT,
        "return math.fsum(value * weight for value, weight, keep in zip(values, weights, use, strict=True) if keep) / total",
        "ReplaceTrueWithFalse",
    ): _STRICT,
    (_REPORT, "pairs: int = 1  # all block pairs of all heads", "NumberReplacer"): "not read where all pairs are kept",
    (_REPORT, "@dataclass(slots=True)", "ReplaceTrueWithFalse"): "slots save memory",
    (_REPORT, "width = max(LEFT + cell * max(map(len, rows), default=0) + 8, 330)", "NumberReplacer"): "without rows the width is the least one",
    (_SCHEDULE, "if len(self.pending) >= self.plan.exchange:", "ReplaceComparisonOperator_GtE_Eq"): "pending grows by one and is emptied at once",
    (
        _SCHEDULE,
        "out = sorted(pending, key=lambda block: -distance[block])",
        "ReplaceUnaryOperator_USub_Invert",
    ): "~x is -x - 1: the order is the same",
    (
        _SCHEDULE,
        "def __init__(self, device: Device, plan: Plan, nbytes: Sequence[int], *, history: int = 4):",
        "ReplaceBinaryOperator_Mul_Div",
    ): "the star is no product",
    (_SELECT, "free = counts[self.open > 0]", "ReplaceComparisonOperator_Gt_NotEq"): "no count is negative",
    (_SELECT, "@dataclass(frozen=True, eq=False)", "ReplaceTrueWithFalse"): "it lives inside one selection, which does not write to it",
    (_SELECT, "free = counts[self.open > 0]", "ReplaceComparisonOperator_Gt_GtE"): "a wider list of the same choice: slower, and right",
    (
        _SELECT,
        "return cls(pairs.to(device), dense.nonzero()[:, 0].to(device), (~dense).nonzero()[:, 0].to(device), (~pairs).sum(1), bare)",
        "NumberReplacer",
    ): "the last of one column is the first",
    ("kernels/dispatch.py", "*,", "ReplaceBinaryOperator_Mul_Div"): "the star is no product",
    (
        _SCHEDULE,
        "self.position = len(self.sequence) - 1 - block if direction == BACKWARD and self.backward else block",
        "ReplaceComparisonOperator_Eq_LtE",
    ): "of the two directions BACKWARD sorts first",
    (
        _SCHEDULE,
        'if record.kind == "compute" and record.block not in found and self.device.happened(record.end):',
        "ReplaceComparisonOperator_Eq_LtE",
    ): "of the three kinds compute sorts first",
    (_SCHEDULE, "residents = min(max(residents, 0), blocks)", "NumberReplacer"): "one more streamed than there are is all of them",
    (_SCHEDULE, "self.position = 0", "NumberReplacer"): "acquire sets it before anybody reads it",
    (_SCHEDULE, "self.backward = False", "ReplaceFalseWithTrue"): "set_backward follows",
    (
        _SCHEDULE,
        "return [found[block] for block in range(self.plan.blocks)] if len(found) == self.plan.blocks else None",
        "ReplaceComparisonOperator_Eq_GtE",
    ): "no more blocks are found than there are",
    (
        _SCHEDULE,
        "def superpipeline(blocks: int, k: int, k_prime: int, *, batch: bool = True) -> Plan:",
        "ReplaceBinaryOperator_Mul_Div",
    ): "the star is no product",
    (
        _SCHEDULE,
        "pairs = [(gone, come) for gone, come in zip(out, fetch, strict=False) if distance[come] < distance[gone]]",
        "ReplaceComparisonOperator_Lt_LtE",
    ): "no two blocks are equally far",
    (
        _SCHEDULE,
        "self.records: deque[Record] = deque(maxlen=3 * history * max(plan.blocks, 1))",
        "NumberReplacer",
    ): "there is a block at least",
    (_REPORT, "position = min(max(density, 0.0), 1.0) * (len(stops) - 1)", "NumberReplacer"): "densities lie in 0..1",
}
"""(module, the line as it stands, operator) -> why no test can see the fault."""

TIMEOUT_S = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(MODULES), help="paths of MODULES (default: all)")
    parser.add_argument("--most", type=int, help="faults of each module, chosen at random with a fixed seed (default: all)")
    parser.add_argument("--again", action="store_true", help="only the faults that survived when the module was last tested")
    options = parser.parse_args()
    if unknown := [module for module in options.modules if module not in MODULES]:
        sys.exit(f"bench/mutants.py: {unknown[0]} is not in its table MODULES")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for module in options.modules:
            before = results[module] if options.again else None
            results[module] = test_module(Path(folder) / module.replace("/", "_"), module, options.most, before)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(markdown(results))
            print(markdown({module: results[module]}), flush=True)


def test_module(copy: Path, module: str, most: int | None, before: dict | None) -> dict:
    """Plant the faults of one module in a copy of the checkout; its row of the table. before: the row of which the survivors are tried again."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=PACK, capture_output=True, check=True, text=True).stdout
    for file in filter(None, files.split("\0")):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACK / file, copy / file)
    tests = [f"tests/{test}" for test in MODULES[module]]
    server = Server(copy, tests)
    try:
        if not server.passes():
            raise SystemExit(f"bench/mutants.py: {' '.join(tests)} fail without any fault")
        (copy / "mutants.toml").write_text(
            f'[cosmic-ray]\nmodule-path = "{module}"\ntimeout = {TIMEOUT_S}\nexcluded-modules = []\n'
            f'test-command = "{sys.executable} {Path(__file__).resolve()} --ask {server.address}"\n[cosmic-ray.distributor]\nname = "local"\n'
        )
        cosmic_ray = [str(Path(sys.executable).parent / "cosmic-ray")]
        subprocess.run([*cosmic_ray, "init", "mutants.toml", "mutants.sqlite"], cwd=copy, check=True)
        known = choose(copy / "mutants.sqlite", (PACK / module).read_text(), most, before)
        subprocess.run([*cosmic_ray, "exec", "mutants.toml", "mutants.sqlite"], cwd=copy, check=True)
        dump = subprocess.run([*cosmic_ray, "dump", "mutants.sqlite"], cwd=copy, capture_output=True, text=True, check=True).stdout
    finally:
        server.stop()
    lines = (PACK / module).read_text().splitlines()
    killed, survivors = 0, []
    for job, result in map(json.loads, dump.splitlines()):
        (mutation,) = job["mutations"]
        if result["test_outcome"] != "survived":
            killed += 1
            continue
        number, operator = mutation["start_pos"][0], mutation["operator_name"].removeprefix("core/")
        line = lines[number - 1].strip()
        added = [text[1:].strip() for text in (result["diff"] or "").splitlines() if text.startswith("+") and not text.startswith("+++")]
        reason = EQUIVALENT.get((module, line, operator))
        survivors.append({"line": number, "source": line, "operator": operator, "fault": " ".join(added), "equivalent": reason})
    faults = killed + len(survivors) if before is None else before["faults"]
    return {
        "date": datetime.date.today().isoformat(),
        "tests": MODULES[module],
        "of": known if before is None else before["of"],
        "faults": faults,
        "killed": faults - len(survivors),
        "survivors": survivors,
    }


def choose(session: Path, source: str, most: int | None, before: dict | None) -> int:
    """Leave the faults that people make and that run (an annotation does not), and of those `most`, or what is like a survivor of `before`.

    Returns how many there were.
    """
    lines = source.splitlines()
    wanted = None if before is None else {(survivor["source"], survivor["operator"]) for survivor in before["survivors"]}
    annotations = [
        (part.lineno, part.col_offset, part.end_col_offset or 0)
        for node in ast.walk(ast.parse(source))
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if part is not None
    ]
    with sqlite3.connect(session) as database:
        rows = database.execute("select job_id, operator_name, start_pos_row, start_pos_col from mutation_specs order by job_id").fetchall()
        kept = sorted(
            job
            for job, operator, row, column in rows
            if OPERATORS.match(operator) and not any(line == row and first <= column < last for line, first, last in annotations)
            if wanted is None or (lines[row - 1].strip(), operator.removeprefix("core/")) in wanted
        )
        known = len(kept)
        kept = sorted(random.Random(0).sample(kept, min(most or known, known)))
        for table in ("mutation_specs", "work_items"):
            database.execute(f"delete from {table} where job_id not in ({','.join('?' * len(kept))})", kept)
    return known


def markdown(results: dict) -> str:
    lines = ["# Planted faults", "", "`make mutants` (bench/mutants.py): faults planted one at a time, and how many of them the tests find.", ""]
    lines += ["| module | faults | killed | equivalent | not killed | date |", "|---|---|---|---|---|---|"]
    for module, row in results.items():
        equivalent = sum(survivor["equivalent"] is not None for survivor in row["survivors"])
        left = len(row["survivors"]) - equivalent
        chosen = "" if row["faults"] == row["of"] else f" of {row['of']}, at random"
        lines.append(
            f"| {module} | {row['faults']}{chosen} | {row['killed']} ({row['killed'] / row['faults']:.0%}) | {equivalent} | {left} | {row['date']} |"
        )
    for module, row in results.items():
        if row["survivors"]:
            lines += ["", f"## Survivors in {module}", ""]
        for survivor in row["survivors"]:
            lines.append(f"- {survivor['line']}: `{survivor['source']}` -> `{survivor['fault']}`: {survivor['equivalent'] or 'not killed'}")
    return "\n".join(lines) + "\n"


class Server:
    """A process that has imported what tests need, and forks to run them on the files as they are."""

    def __init__(self, copy: Path, tests: list[str]):
        self.address = str(copy / "tests.socket")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.address)
        self.listener.listen()
        self.process = os.fork()
        if not self.process:
            os.chdir(copy)
            serve(self.listener, tests)

    def passes(self) -> bool:
        return ask(self.address)

    def stop(self) -> None:
        os.kill(self.process, signal.SIGTERM)
        os.waitpid(self.process, 0)


def serve(listener: socket.socket, tests: list[str]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    os.environ["OMP_NUM_THREADS"] = "1"
    import hypothesis  # noqa: F401
    import pytest
    import torch

    torch.set_num_threads(1)
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            signal.alarm(TIMEOUT_S)  # a fault that never ends is found out, too
            try:
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    status = pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests])
                connection.sendall(bytes([int(status)]))
            finally:  # or this child, whom nobody listens to any more, would tidy up for its parent
                os._exit(0)
        connection.close()


def ask(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        return connection.recv(1) == b"\0"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]:
        sys.exit(not ask(sys.argv[2]))
    main()
