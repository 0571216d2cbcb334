import pytest

from jaxml.lm import chat
from jaxml.testing import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


def with_template(template):
    return tiny_tokenizer(64, template)


def test_smollm2_template(smollm2):
    text = chat.render(smollm2.tokenizer, MESSAGES)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n") and "SmolLM" in text


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template):
    with pytest.raises(ValueError, match="refused"):
        chat.render(with_template(template), MESSAGES)


def test_what_a_template_refuses_is_a_sentence():
    with pytest.raises(ValueError, match="roles alternate"):
        chat.render(with_template("{{ raise_exception('roles alternate') }}"), MESSAGES)
    with pytest.raises(ValueError, match="refused"):
        chat.render(with_template("{% if %}"), MESSAGES)


@pytest.mark.parametrize(
    "messages, word",
    [
        ([], "none"),
        ([{"role": "user"}], "content"),
        ([{"role": "robot", "content": "x"}], "robot"),
        ([{"role": "user", "content": 3}], "int"),
    ],
)
def test_bad_messages_are_refused(messages, word):
    with pytest.raises(ValueError, match=word):
        chat.render(with_template("x"), messages)


def test_a_model_without_a_template_says_so():
    with pytest.raises(ValueError, match="no chat template"):
        chat.render(tiny_tokenizer(), MESSAGES)
