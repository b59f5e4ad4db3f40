"""Model text is never code: scorers run in workers without rights, and every reasoning-gym scorer meets hostile text."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import textwrap
import time

import pytest
from reasoning_gym.factory import DATASETS, create_dataset

from drift.config import TaskConfig
from drift.scoring import judges
from drift.scoring.judges import AS_TEXT, EVALUATES, check_expression, evaluate
from drift.scoring.sandbox import Failed, Question, Sandbox, SandboxError
from drift.tasks import TaskError, load_task

NEEDS_SECCOMP = pytest.mark.skipif(sys.platform != "linux", reason="workers are confined by seccomp, which Linux has")


def hostile(marker) -> list[str]:
    write = f"open({str(marker)!r}, 'w')"
    return [
        f"__import__('os').system('touch {marker}')",
        f"[{write}]",
        f"(lambda: {write})()",
        f"exec({write!r})",
        "().__class__.__base__.__subclasses__()",
        "9**9**9",
        "[str(9**9**9)]",
        "1<<(1<<99)",
        "[0]*9**9",
        "(" * 5000,
        "\ud800",
        "no idea",
    ]


@pytest.fixture(scope="module")
def gym():
    with Sandbox("gym", workers=1, seconds=20) as sandbox:
        yield sandbox


@NEEDS_SECCOMP
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a generator leaves its file open
def test_no_generators_scorer_runs_hangs_or_pays_for_hostile_text(gym, tmp_path):
    marker = tmp_path / "written"
    assert gym.confined()
    paid = []
    for name in sorted(set(DATASETS) - {"composite"}):  # which is made of others
        entry = create_dataset(name, size=1, seed=0)[0]
        gold = None if entry["answer"] is None else str(entry["answer"])
        asked = [Question(text, gold, {"name": name, "options": {}, "entry": entry}) for text in hostile(marker)]
        verdicts = gym.ask(asked)
        assert not [v.reason for v in verdicts if isinstance(v, Failed)], name
        paid += [(name, q.answer) for q, verdict in zip(asked, verdicts) if float(verdict) >= 1 and q.answer != gold]
    assert not paid
    assert gym.killed == 0
    assert not marker.exists()


def test_gold_answers_are_right_for_generators_that_have_one(gym):
    for name in sorted(EVALUATES | AS_TEXT | {"chain_sum", "prime_factorization"}):
        entry = create_dataset(name, size=1, seed=0)[0]
        if entry["answer"] is not None:
            gold = str(entry["answer"])
            assert gym.ask([Question(gold, gold, {"name": name, "options": {}, "entry": entry})]) == [1.0], name


def test_every_scorer_that_evaluates_text_is_listed():
    found = set()
    for name, (kind, _) in DATASETS.items():
        if "score_answer" in vars(kind):
            tree = ast.parse(textwrap.dedent(inspect.getsource(kind.score_answer)))
            calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
            called = {
                f.id if isinstance(f, ast.Name) else f.attr for f in calls if isinstance(f, ast.Name | ast.Attribute)
            }
            if called & {"eval", "exec", "parse_expr", "sympify", "parse_latex", "compile", "loads"} - {"loads"}:
                found.add(name)
    assert found - {"number_sorting"} == EVALUATES  # number_sorting evaluates its own answer


@pytest.mark.parametrize("text", ["[1, -2, (3, 'a')]", "2 + 3 * 4", "0x1f << 2", "{'a': 1}", "-5 // 2"])
def test_literals_and_arithmetic_are_evaluated_as_python_does(text):
    assert evaluate(text) == eval(text)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "f(1)",
        "[x for x in (1,)]",
        "().__class__",
        "'a' * 9",
        "[0] * 9",
        "9**9**9",
        "1 << 99999",
        "lambda: 1",
        "(" * 999,
    ],
)
def test_anything_else_is_not_evaluated(text):
    with pytest.raises((ValueError, SyntaxError)):
        evaluate(text)


@pytest.mark.parametrize("text", ["x**2/2 + C", "2*sin(x)*exp(-x)", "(3 + 4)*6/2", "x*y - 3"])
def test_expressions_of_elementary_functions_pass(text):
    check_expression(text)


@pytest.mark.parametrize(
    "text", ["__import__('os')", "x.subs", "open('a')", "sin.__class__", "x[0]", "'a'", "sympify('1')", "9**9**9"]
)
def test_other_expressions_do_not(text):
    with pytest.raises(ValueError, match=r"no part of an expression|too large"):
        check_expression(text)


SCORER = """
import os, socket, subprocess, threading
def tries(answer, gold, problem):
    try:
        exec(answer, globals())
    except OSError:
        return 0.0
    return 1.0
def graded(answer, gold, problem):
    return {"half": 0.5, "bad": float("nan")}.get(answer, float(answer == gold))
def raises(answer, gold, problem):
    raise KeyError(answer)
def hangs(answer, gold, problem):
    while answer == "hang":
        pass
    return float(answer == gold)
"""


@pytest.fixture
def scorers(tmp_path, monkeypatch):
    (tmp_path / "own_scorers.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@NEEDS_SECCOMP
@pytest.mark.parametrize(
    "code",
    [
        "open('/tmp/written-by-a-worker', 'w')",
        "os.unlink('/tmp/nothing-there')",
        "os.mkdir('/tmp/made-by-a-worker')",
        "socket.socket()",
        "socket.create_connection(('127.0.0.1', 9))",
        "subprocess.run(['true'])",
        "os.fork()",
        "os.kill(os.getppid(), 0)",
        "os.execv('/bin/true', ['true'])",
        "open('/etc/passwd')",
        "open('/proc/1/environ')",
        "os.chmod('/tmp', 0o777)",
        "os.symlink('/a', '/tmp/made-by-a-worker')",
    ],
)
def test_code_in_a_worker_has_no_rights(worker, code):
    assert worker.ask([Question(code, "")]) == [0.0]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_scorers.py").write_text(SCORER)
    sys.path.insert(0, str(folder))
    os.environ["A_SECRET"] = "token"
    try:
        with Sandbox("function", workers=1, seconds=20, path="own_scorers:tries") as sandbox:
            yield sandbox
    finally:
        sys.path.remove(str(folder))
        del os.environ["A_SECRET"]


def test_a_worker_sees_no_secret_and_has_a_limit_of_memory(worker):
    assert worker.ask([Question("if 'A_SECRET' in os.environ: raise OSError", "")]) == [1.0]
    [verdict] = worker.ask([Question("x = bytearray(8 << 30)", "")])
    assert isinstance(verdict, Failed)
    assert "MemoryError" in verdict.reason


def test_a_scorer_by_import_path_grades_and_its_faults_are_no_verdicts(scorers):
    with Sandbox("function", workers=1, seconds=20, path="own_scorers:graded") as sandbox:
        half, right, bad = sandbox.ask([Question("half", "a"), Question("a", "a"), Question("bad", "a")])
    assert (half, right) == (0.5, 1.0)
    assert isinstance(bad, Failed)
    assert "finite" in bad.reason
    with Sandbox("function", workers=1, seconds=20, path="own_scorers:raises") as sandbox:
        [verdict] = sandbox.ask([Question("text", "a")])
    assert isinstance(verdict, Failed)
    assert "KeyError: 'text'" in verdict.reason


def test_an_answer_that_hangs_is_wrong_and_its_worker_is_replaced(scorers):
    with Sandbox("function", workers=2, seconds=1.0, path="own_scorers:hangs") as sandbox:
        sandbox.ask([Question("a", "a")])
        assert sandbox.ask([Question("hang", "a"), Question("a", "a")]) == [0.0, 1.0]
        assert sandbox.killed == 1
        [verdict] = sandbox.ask([Question("hang", "hang")])
    assert isinstance(verdict, Failed)  # it hangs on the right answer too


def test_two_threads_never_wait_for_one_idle_worker(monkeypatch):
    """A queue that says it is not empty may be when its item is taken."""
    with Sandbox("math", workers=2, seconds=20) as sandbox:
        sandbox.ask([Question("x+1", "1+x")])
        taken = sandbox._idle.get_nowait

        def late():
            time.sleep(0.05)
            return taken()

        monkeypatch.setattr(
            sandbox, "_idle", type("Late", (), {"get_nowait": staticmethod(late), "put": sandbox._idle.put})()
        )
        assert sandbox.ask([Question("x+x", "2x"), Question("x-x", "2x")]) == [1.0, 0.0]


def test_a_scorer_that_does_not_import_is_named():
    with pytest.raises(SandboxError, match=r"own_missing:score(.|\n)*No module named 'own_missing'"):
        Sandbox("function", path="own_missing:score").confined()


def test_without_a_sandbox_generators_that_evaluate_are_refused_unless_allowed(monkeypatch):
    monkeypatch.setattr(Sandbox, "confined", lambda self: False)
    config = TaskConfig(name="countdown", train_problems=1)
    with pytest.raises(TaskError, match=r"task\.name='countdown'.*task\.unsafe_scorers=allow"):
        load_task(config)
    load_task(config.model_copy(update={"unsafe_scorers": "allow"})).close()
    load_task(TaskConfig(name="chain_sum", train_problems=1)).close()
    assert "countdown" in judges.EVALUATES


def test_a_sandbox_wants_a_time_limit():
    with pytest.raises(ValueError, match="seconds=0"):
        Sandbox("math", seconds=0)
