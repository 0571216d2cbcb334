"""Chat messages to a prompt, through the model's own template in a sandbox."""

from collections.abc import Sequence
from typing import TypedDict

from jaxml.lm import sandbox
from jaxml.lm.tokenizer import Tokenizer


class Message(TypedDict):
    """One turn of a conversation: who says what.

    Example:
        >>> Message(role="user", content="Who?")
        {'role': 'user', 'content': 'Who?'}
    """

    role: str  # "system", "user" or "assistant"
    content: str


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
    """The text that the model was trained to see for these messages.

    Args:
        messages: turns in order.
        generation_prompt: open the assistant's turn at the end, for the model to go on.

    Raises:
        ValueError: no template, a message without role or content, or what the template itself refuses.

    Example:
        >>> from jaxml import testing
        >>> template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
        >>> template += "{% if add_generation_prompt %}<assistant>{% endif %}"
        >>> tokenizer = testing.tiny_tokenizer(chat_template=template)
        >>> render(tokenizer, [Message(role="user", content="Who?")])
        '<user> Who? <assistant>'
    """
    if not tokenizer.chat_template:
        raise ValueError("chat.render: this model has no chat template. Write the prompt as plain text instead.")
    check(messages)
    return sandbox.render(
        tokenizer.chat_template,
        messages=list(messages),
        add_generation_prompt=generation_prompt,
        bos_token=tokenizer.token(tokenizer.bos_id) or "",
        eos_token=tokenizer.token(tokenizer.eos_ids[0]) if tokenizer.eos_ids else "",
    )


def check(messages: Sequence[Message]) -> None:
    """Raises ValueError unless each message has a known role and a string as content.

    Example:
        >>> check([{"role": "robot", "content": "Who?"}])
        Traceback (most recent call last):
            ...
        ValueError: chat: a role is system, user, assistant or tool, got 'robot'.
    """
    if not isinstance(messages, list | tuple):
        raise ValueError(f"chat: messages are a list, got {type(messages).__name__}.")
    if not messages:
        raise ValueError("chat: at least one message is given, got none.")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"chat: message {i} has the keys role and content, got {message!r}.")
        if message["role"] not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"chat: a role is system, user, assistant or tool, got {message['role']!r}.")
        if not isinstance(message["content"], str):
            raise ValueError(f"chat: content is text, got {type(message['content']).__name__} in message {i}.")
