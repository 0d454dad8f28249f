"""The prompts of a dataset, looked through before a model is loaded."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset


def check_prompts(dataset: Any, tokenizer: Any = None):
    """Refuse prompts that TRL would stumble over in the middle of training, or train on in silence.

    Args:
        dataset: With the column `prompt`: texts, or chats (lists of messages with `role` and `content`). A streamed
            dataset is left alone.
        tokenizer: Renders one chat of each sequence of roles, where it has a chat template.

    Raises:
        ValueError: for a prompt that is missing or empty, texts beside chats, a malformed message, or a message that
            the chat template refuses or leaves out; with the row's number (the first is 0).
    """
    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        return
    first_kind, rendered = None, set()
    for row, prompt in enumerate(dataset["prompt"]):
        where = f"Row {row} of the dataset (the first is 0)"
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise ValueError(f"{where} has no prompt: {prompt!r}. Give it one, or take it out.")
        kind = "text" if isinstance(prompt, str) else "chat"
        first_kind = first_kind or kind
        if kind != first_kind:
            raise ValueError(f"{where} has a prompt that is a {kind}, but row 0 has a {first_kind}. Use one kind.")
        if kind == "text":
            continue
        roles = roles_of(prompt, where)
        if roles not in rendered and getattr(tokenizer, "chat_template", None):
            rendered.add(roles)
            check_rendering(prompt, tokenizer, where)


def roles_of(chat: Sequence[dict], where: str) -> tuple[str, ...]:
    """The roles of a chat's messages, which are checked."""
    for message in chat:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"{where} has a message {message!r:.200}. Messages need a 'role' and a 'content'.")
    last = chat[-1]
    if last["content"] is None or (isinstance(last["content"], str) and not last["content"].strip()):
        raise ValueError(f"{where} ends with an empty message of the role '{last['role']}'. Give it a text.")
    return tuple(message["role"] for message in chat)


def check_rendering(chat: Sequence[dict], tokenizer: Any, where: str):
    """Raise a `ValueError` if a chat template refuses a chat, or leaves a text of it out."""
    try:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # jinja raises what the template says
        roles = ", ".join(message["role"] for message in chat)
        raise ValueError(
            f"{where}: the chat template refuses its messages ({error}). Their roles: {roles}."
        ) from error
    for message in chat:
        content = message["content"]
        if isinstance(content, str) and message["role"] != "assistant" and content.strip() not in text:
            raise ValueError(
                f"{where}: the chat template leaves out its message of the role '{message['role']}'. Use roles that "
                "it knows, such as system and user."
            )
