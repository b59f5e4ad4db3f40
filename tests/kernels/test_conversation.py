"""Which tokens of a conversation are trained: what is drawn, and what is refused."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drift_kernels.conversation import GREEN, RED, check_trained, role_markers, show_trained

WORDS = ["<pad>", "<end>", "<sys>", "<usr>", "<bot>", "<tool>", "two", "and", "three", "is", "five", "?", "no", "four"]
PAD, EOS, SYS, USR, BOT, TOOL = range(6)
CHAT = "{% for m in messages %}{{ {'system': '<sys>', 'user': '<usr>', 'assistant': '<bot>', 'tool': '<tool>'}[m['role']] }}"
CHAT += " {{ m['content'] }} <end> {% endfor %}"


@pytest.fixture
def tokenizer():
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>")
    made.chat_template = CHAT
    return made


IDS = [USR, 6, 11, EOS, BOT, 13, EOS, TOOL, 12, EOS, BOT, 10, EOS]
TRAINED = [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]


def labels(trained=TRAINED, ids=IDS):
    return [i if t else -100 for i, t in zip(ids, trained)]


def options(tokenizer):
    return {"decode": tokenizer.decode, "markers": role_markers(tokenizer), "eos": EOS, "colour": False}


def changed(*places):
    return [1 - t if place in places else t for place, t in enumerate(TRAINED)]


def test_markers_come_from_the_template(tokenizer):
    assert role_markers(tokenizer) == {"system": [SYS], "user": [USR], "assistant": [BOT], "tool": [TOOL]}
    tokenizer.chat_template = CHAT.replace("'tool': '<tool>'", "'tool': '<usr>'")
    assert role_markers(tokenizer) == {"system": [SYS], "user": [USR], "assistant": [BOT]}
    tokenizer.chat_template = CHAT.replace("'system': '<sys>'", "'system': '<usr>'")
    assert role_markers(tokenizer) == {"user": [USR], "assistant": [BOT], "tool": [TOOL]}
    tokenizer.chat_template = "{{ raise_exception('no tools') if messages[-1]['role'] == 'tool' }}" + CHAT
    assert set(role_markers(tokenizer)) == {"system", "user", "assistant"}
    thinking = CHAT.replace("{{ m['content'] }}", "{{ '\n<sys>\n' if m['role'] == 'assistant' }}{{ m['content'] }}")
    tokenizer.chat_template = thinking
    assert role_markers(tokenizer)["assistant"] == [BOT]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(ValueError, match="not user and assistant"):
        role_markers(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat_template is not set"):
        role_markers(tokenizer)


def test_a_conversation_as_it_should_be_is_drawn(tokenizer):
    text = check_trained([IDS], [labels()], **options(tokenizer))
    assert text == "[0] <usr>two?<end><bot>⟦four<end>⟧<tool>no<end><bot>⟦five<end>⟧"
    assert check_trained(torch.tensor([IDS]), torch.tensor([TRAINED]).bool(), **options(tokenizer)) == text
    assert check_trained([IDS], [TRAINED], **options(tokenizer)) == text  # 0 and 1, as trainers' masks are
    coloured = check_trained([IDS], [labels()], **options(tokenizer) | {"colour": True})
    assert coloured.count(GREEN) == 2
    assert GREEN + "four" in coloured
    assert RED not in coloured


@pytest.mark.parametrize(
    ("trained", "problem"),
    [
        ([0] * 13, "nothing is trained"),
        (changed(1), "1 trained tokens are in a turn of user"),
        (changed(8, 9), "2 trained tokens are in a turn of tool"),
        (changed(6), "tokens 4 to 6 is trained up to id 13, which does not end it"),
        (changed(12), "tokens 10 to 12 is trained up to id 10"),
    ],
)
def test_what_is_wrong_is_said_of_its_row(tokenizer, trained, problem):
    rows, marks = [IDS, IDS], [labels(), labels(trained)]
    with pytest.raises(ValueError, match=problem) as error:
        check_trained(rows, marks, **options(tokenizer))
    assert "1 of 2 conversations" in str(error.value)
    assert "[1] " in str(error.value)
    assert "[0] " not in str(error.value)
    shown = show_trained(rows, marks, **options(tokenizer) | {"colour": True})
    assert (RED in shown) == ("in a turn of" in problem)


def test_two_turns_in_a_row_end_each(tokenizer):
    """Also where nobody speaks between them."""
    ids, trained = [USR, 6, EOS, BOT, 7, BOT, 8, EOS], [0, 0, 0, 0, 1, 0, 1, 1]
    with pytest.raises(ValueError, match="the turn at tokens 3 to 4 is trained up to id 7, which does not end it"):
        check_trained([ids], [labels(trained, ids)], **options(tokenizer))
    ids, trained = [*ids[:5], EOS, *ids[5:]], [*trained[:5], 1, *trained[5:]]
    assert check_trained([ids], [labels(trained, ids)], **options(tokenizer)).count("⟦") == 2


def test_labels_that_were_shifted_are_told(tokenizer):
    twos = [PAD, EOS, EOS]  # ids, though they are 0 and 1
    assert show_trained([twos], [twos], tokenizer.decode, colour=False) == "[0] ⟦<pad><end><end>⟧"
    with pytest.raises(ValueError, match="shifted already"):
        check_trained([IDS], [[*labels()[1:], -100]], **options(tokenizer))


def test_without_markers_runs_of_trained_tokens_end_with_eos(tokenizer):
    few = {"decode": tokenizer.decode, "eos": [EOS], "colour": False}
    check_trained([IDS], [labels()], **few)
    check_trained([IDS], [labels(changed(1, 2, 3))], **few)  # whose turn it is is not known
    with pytest.raises(ValueError, match="tokens 5 to 5 is trained up to id 13"):
        check_trained([IDS], [labels(changed(6))], **few)


def test_padding_and_rows_end_to_end(tokenizer):
    padded = torch.tensor([[PAD, PAD, *IDS], [*IDS, EOS, EOS]])
    mask = torch.tensor([[0, 0, *[1] * 13], [*[1] * 13, 0, 0]])
    marks = torch.tensor([[-100, -100, *labels()], [*labels(), EOS, EOS]])
    text = check_trained(padded, marks, attention_mask=mask, **options(tokenizer))
    assert "<pad>" not in text
    flat, ends = torch.tensor([IDS + IDS]), torch.tensor([0, 13, 26], dtype=torch.int32)
    assert text == check_trained(flat, torch.tensor([labels() * 2]), cu_seqlens=ends, **options(tokenizer))
    with pytest.raises(ValueError, match="nothing is trained") as error:
        check_trained(flat, torch.tensor([labels() + [-100] * 13]), cu_seqlens=ends, **options(tokenizer))
    assert "1 of 2" in str(error.value)


def test_what_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="one shape"):
        check_trained([IDS], [labels()[1:]], **options(tokenizer))
    with pytest.raises(ValueError, match="one flattened row, not 2"):
        check_trained([IDS, IDS], [labels(), labels()], cu_seqlens=[0, 13], **options(tokenizer))
    with pytest.raises(ValueError, match=r"markers are of \['user'\]"):
        check_trained([IDS], [labels()], tokenizer.decode, markers={"user": [USR]})
    with pytest.raises(ValueError, match="should rise from 0 to the 13 tokens"):
        check_trained([IDS], [labels()], cu_seqlens=[0, 7, 12], **options(tokenizer))
    with pytest.raises(ValueError, match="nothing stands everywhere"):
        check_trained([IDS], [labels()], tokenizer.decode, markers={"user": [USR], "assistant": []})
