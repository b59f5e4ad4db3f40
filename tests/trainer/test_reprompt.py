"""What the teacher is shown, who has one, and that it reads the student's own tokens one to one."""

import doctest

import pytest
import torch
from test_chat import TEMPLATES

import drift_kernels
from drift.buffer import BufferConfig, SuccessBuffer
from drift.config import ModelConfig
from drift.model import chat
from drift.model.policy import load_policy
from drift.online import reprompt
from drift.online.reprompt import (
    Attempt,
    Lesson,
    TeacherConfig,
    fit,
    informative,
    lessons,
    rewrite,
    strip_thinking,
    teacher_trajectory,
)
from drift.packing import pack
from drift.rollouts.feedback import FEEDBACK, Feedback
from drift.types import Problem, Trajectory, Turn

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 + 8 ="}]
BOTH = Lesson("<answer>15</answer>", "14 is even, the sum is odd")


@pytest.fixture(params=TEMPLATES)
def policy(request):
    made = load_policy(ModelConfig(hidden_size=16, layers=1, heads=2), seed=3)
    made.tokenizer.chat_template = TEMPLATES[request.param]
    return made


def spoken(policy, turns=3, role="user"):
    """A conversation whose turns are ids that no tokenizer would give for their text, as sampling makes them."""
    draw = torch.Generator().manual_seed(0)
    end = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages, ids, spans = list(ASKED), chat.render(policy.tokenizer, ASKED, True), []
    for number in range(turns):
        if number:
            messages.append({"role": role, "content": f"Incorrect. {number}"})
            ids = chat.extend(policy, ids, messages)
        letters = policy.tokenizer.convert_tokens_to_ids(list("abcdefgh"))
        said = [letters[i] for i in torch.randint(8, (5 + number,), generator=draw).tolist()]
        spans.append(Turn(len(ids), len(ids) + len(said) + 1))
        ids = [*ids, *said, end]
        messages.append({"role": "assistant", "content": policy.tokenizer.decode(said)})
    logprobs = [0.0] * len(ids)
    for span in spans:
        logprobs[span.start : span.stop] = [-0.5] * (span.stop - span.start)
    return Trajectory("p", ids, spans, 1.0, 4, logprobs=logprobs), messages


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize("lesson", [BOTH, Lesson(BOTH.demonstration), Lesson(None, BOTH.feedback)])
def test_responses_are_the_students_own_ids(policy, lesson, role):
    student, messages = spoken(policy, role=role)
    teacher = teacher_trajectory(policy.tokenizer, student, messages, lesson)
    shift = len(teacher.token_ids) - len(student.token_ids)
    assert shift > 0
    for ours, theirs in zip(student.turns, teacher.turns):
        assert (theirs.start - ours.start, theirs.stop - ours.stop) == (shift, shift)
        spoken_there = teacher.token_ids[theirs.start : theirs.stop]
        assert spoken_there == student.token_ids[ours.start : ours.stop]
        assert teacher.logprobs[theirs.start : theirs.stop] == student.logprobs[ours.start : ours.stop]
    first = student.turns[0].start
    assert teacher.token_ids[first + shift :] == student.token_ids[first:]  # later messages too
    shown = policy.tokenizer.decode(teacher.token_ids[: first + shift])
    told = "\n\n".join(
        part
        for part in (
            "7 + 8 =",
            lesson.demonstration and f"Correct solution:\n\n{lesson.demonstration}",
            lesson.feedback
            and f"The following is feedback from your unsuccessful earlier attempt:\n\n{lesson.feedback}",
            "Correctly solve the original question.",
        )
        if part
    )
    assert shown == policy.tokenizer.decode(student.token_ids[:first]).replace("7 + 8 =", told)
    assert (teacher.index, teacher.problem_id, len(teacher.logprobs)) == (4, "p", len(teacher.token_ids))


def test_packs_line_up_token_by_token(policy):
    """The k-th response token of a student's pack is the k-th of the teacher's, and scores as the plain model says."""
    student, messages = spoken(policy)
    other, asked = spoken(policy, turns=1)
    teachers = [teacher_trajectory(policy.tokenizer, t, m, BOTH) for t, m in ((student, messages), (other, asked))]
    [ours] = pack([student, other], 4096, turns="assistant")
    [theirs] = pack(teachers, 4096, turns="assistant")
    assert torch.equal(ours.targets[ours.response_mask], theirs.targets[theirs.response_mask])
    with policy.inference():
        scored = drift_kernels.linear_logprob(policy.hidden(theirs), policy.head().weight, theirs.targets)
        expected = []
        for teacher in teachers:
            ids = torch.tensor(teacher.token_ids)
            logits = policy.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            expected += [logits[i - 1, ids[i]] for turn in teacher.turns for i in range(turn.start, turn.stop)]
    got = scored.logprobs[theirs.response_mask].double()
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_sample_of_one_turn_from_a_template_history(policy):
    """Its prompt holds the earlier turns as the template shows them, under the lesson too."""
    messages = [
        *ASKED,
        {"role": "assistant", "content": "<think>h</think>14"},
        {"role": "user", "content": "Incorrect."},
    ]
    prompt = chat.render(policy.tokenizer, messages, True)
    said = chat.encode(policy.tokenizer, "15<|im_end|>")
    student = Trajectory("p", prompt + said, [Turn(len(prompt), len(prompt) + len(said))])
    whole = [*messages, {"role": "assistant", "content": "15"}]
    teacher = teacher_trajectory(policy.tokenizer, student, whole, BOTH)
    assert teacher.token_ids[-len(said) :] == said
    expected = chat.render(policy.tokenizer, rewrite(messages, BOTH), True)
    assert teacher.token_ids[: -len(said)] == expected
    assert teacher.logprobs is None


def test_a_prompt_that_nobody_rendered_is_refused(policy):
    student, messages = spoken(policy)
    student.token_ids = student.token_ids[1:]
    student.turns = [Turn(t.start - 1, t.stop - 1) for t in student.turns]
    with pytest.raises(ValueError, match=r"row 4 \(problem p\): the \d+ ids before the first turn are not what"):
        teacher_trajectory(policy.tokenizer, student, messages, BOTH)
    with pytest.raises(ValueError, match="3 turns and 0 assistant messages"):
        teacher_trajectory(policy.tokenizer, student, ASKED, BOTH)


def test_rewrite_touches_the_first_user_message_alone():
    messages = [*ASKED, {"role": "assistant", "content": "a"}, {"role": "user", "content": "Incorrect."}]
    new = rewrite(messages, BOTH)
    assert [a is b for a, b in zip(messages, new)] == [True, False, True, True]
    assert ASKED[1]["content"] == "7 + 8 ="
    for refused in ([ASKED[0]], [{"role": "user", "content": [{"type": "image"}]}]):
        with pytest.raises(ValueError, match="the first user message's text"):
            rewrite(refused, BOTH)


def test_a_prompt_that_is_too_long_loses_the_beginning_of_its_lesson(policy):
    tokenizer, lesson = policy.tokenizer, Lesson("abcdefgh " * 9 + "so 15", "14 is even")
    whole = len(chat.render(tokenizer, rewrite(ASKED, lesson), True))
    assert fit(tokenizer, ASKED, lesson, whole) is lesson
    cut = fit(tokenizer, ASKED, lesson, whole - 7)
    assert len(chat.render(tokenizer, rewrite(ASKED, cut), True)) <= whole - 7
    assert lesson.demonstration.endswith(cut.demonstration)
    assert cut.demonstration.endswith("so 15")
    assert cut.feedback == lesson.feedback
    bare = len(chat.render(tokenizer, rewrite(ASKED, Lesson(None, "x")), True))
    alone = fit(tokenizer, ASKED, lesson, bare + 2)
    assert alone.demonstration is None
    assert lesson.feedback.endswith(alone.feedback)
    assert fit(tokenizer, ASKED, lesson, 8) is None


def attempt(text, solved=False, problem="p", entropy=0.0, **more):
    return Attempt(problem, text, solved, entropy=entropy, **more)


def demonstrations(attempts, config=None, **more):
    return [lesson and lesson.demonstration for lesson in lessons(attempts, config or TeacherConfig(), **more)]


def test_demonstrations_come_from_successful_siblings():
    batch = [attempt("w"), attempt("a", True), attempt("b", True), attempt("x", problem="q")]
    assert demonstrations(batch) == ["a", "b", "a", None]
    assert demonstrations(batch, TeacherConfig(exclude_own=False)) == ["a", "a", "a", None]
    assert demonstrations(batch, TeacherConfig(demonstrations=False)) == [None] * 4


def test_a_sibling_with_another_index_teaches_whatever_its_text():
    """Right answers that read the same once thinking is stripped, or word for word, still teach each other."""
    thought = [attempt("<think>1</think>a", True), attempt("<think>2</think>a", True), attempt("w")]
    assert demonstrations(thought) == ["a", "a", "a"]
    kept = TeacherConfig(strip_thinking=False)
    assert demonstrations(thought, kept) == ["<think>2</think>a", "<think>1</think>a", "<think>1</think>a"]
    assert demonstrations([attempt("a", True), attempt("a", True)]) == ["a", "a"]
    assert demonstrations([attempt("<think>a", True), attempt("w")]) == [None, None]  # nothing to show
    assert demonstrations([attempt("a", True), attempt("w", problem="q")]) == [None, None]  # nobody else solved it


def test_which_sibling_is_shown():
    batch = [
        attempt("w"),
        attempt("a", True, score=0.5, entropy=0.25),
        attempt("b", True, score=0.5, entropy=0.75),
        attempt("c", True, score=1.0, entropy=0.5),
    ]
    assert demonstrations(batch) == ["b", "b", "c", "b"]  # of highest sequence entropy
    assert demonstrations(batch, TeacherConfig(choose="best")) == ["c", "c", "c", "a"]
    assert demonstrations(batch, TeacherConfig(choose="first")) == ["a", "b", "a", "a"]
    unmeasured = [attempt("w"), attempt("a", True, entropy=None)]
    with pytest.raises(ValueError, match=r"attempts\[1\]\.entropy is None; teacher.choose 'entropy' must know it"):
        demonstrations(unmeasured)
    assert demonstrations(unmeasured, TeacherConfig(choose="first")) == ["a", None]


def test_else_from_the_buffer():
    buffer = SuccessBuffer(BufferConfig(start_step=3))
    for problem, text in (("p", "old"), ("q", "old"), ("q", "own")):
        buffer.add(problem, text, 1.0, 0)
    batch = [
        attempt("w"),
        attempt("a", True),
        attempt("x", problem="q"),
        attempt("own", True, "q"),
        attempt("y", problem="r"),
    ]
    assert demonstrations(batch, buffer=buffer, step=3) == ["a", "old", "own", "old", None]
    assert demonstrations(batch, buffer=buffer, step=2) == ["a", None, "own", None, None]


def test_the_buffer_is_compared_by_raw_text_and_shown_without_thinking():
    buffer = SuccessBuffer(BufferConfig())
    for thought, entropy in (("1", 0.5), ("2", 0.9), ("3", 0.1)):
        buffer.add("p", f"<think>{thought}</think>a{thought}", 1.0, 0, entropy)
    own = [attempt("<think>2</think>a2", True)]
    assert demonstrations(own, buffer=buffer) == ["a1"]  # its own raw text is left out, not the answers like it
    assert demonstrations([attempt("a2", True)], buffer=buffer) == ["a2"]
    assert demonstrations(own, TeacherConfig(choose="first"), buffer=buffer) == ["a1"]
    assert demonstrations(own, TeacherConfig(exclude_own=False), buffer=buffer) == ["a2"]
    assert demonstrations([attempt("w")], TeacherConfig(strip_thinking=False), buffer=buffer) == ["<think>2</think>a2"]


def test_feedback_makes_a_teacher_where_it_is_informative():
    batch = [
        attempt("w", feedback=FEEDBACK),
        attempt("w", feedback="line 3: 14 is even"),
        attempt("a", True, "q", feedback="line 3: 14 is even"),
        attempt("w", problem="r"),
    ]
    assert lessons(batch, TeacherConfig()) == [None, Lesson(None, "line 3: 14 is even"), None, None]
    assert lessons(batch, TeacherConfig(feedback="off")) == [None] * 4
    with_both = [attempt("w", feedback="14 is even"), attempt("a", True)]
    for mode, shown in (("off", None), ("without_solution", None), ("always", "14 is even")):
        assert lessons(with_both, TeacherConfig(feedback=mode)) == [Lesson("a", shown), None]
    assert TeacherConfig.model_validate({"feedback": False}).feedback == "off"  # as YAML reads off
    full = Feedback("full", 5, 512, format_rule="Answer inside the tag.")(
        Problem("p", "What is 7 + 8?", "15"), 1, parsed=False
    )
    asked = [attempt("w", feedback=full)]
    assert lessons(asked, TeacherConfig(), prompts=["What is 7 + 8?"]) == [None]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a", "a"),
        ("<think>x</think>a", "a"),
        ("x</think> a", "a"),  # the template has opened it
        ("<think>x</think>a<think>y</think>b", "b"),
        ("a<think>y", "a"),
        ("<think>y", ""),
    ],
)
def test_strip_thinking(text, left):
    assert strip_thinking(text) == left


@pytest.mark.parametrize(
    "bare",
    ["Incorrect.", "Incorrect", FEEDBACK, "", " \n", "Wrong answer! Please try again.", "no", "Your answer is not correct.",
     "That's wrong; try once more", "Sorry, incorrect - think again", "Incorrect. This was turn 2 of 5."],
)  # fmt: skip
def test_a_bare_verdict_is_not_informative(bare):
    assert not informative(bare)


@pytest.mark.parametrize(
    "telling",
    ["Incorrect: 14 is even.", "TypeError: 'int' object is not callable", "Expected 15", "wrong sign", "Test 3 failed", "42"],
)  # fmt: skip
def test_what_says_more_is_informative(telling):
    assert informative(telling)


def test_the_example_runs():
    assert doctest.testmod(reprompt) == doctest.TestResults(failed=0, attempted=5)
