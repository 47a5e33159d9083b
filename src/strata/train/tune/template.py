"""The chat template of a tokenizer that has none: plain words, no new tokens.

User: What is the capital of Peru?
Assistant: Lima</s>
"""

from __future__ import annotations

from typing import Any

from strata.errors import ConfigError

# The answer's space belongs to the answer: in byte-level vocabularies a word begins with it, so a
# prompt's tokens are the same with and without what follows them.
DEFAULT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- set content = message['content'] | trim %}"
    "{%- if message['role'] == 'user' %}{{- 'User: ' + content + '\\n' }}"
    "{%- elif message['role'] == 'system' %}{{- 'System: ' + content + '\\n' }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{- 'Assistant:' }}{% generation %}{{- ' ' + content + eos_token }}{% endgeneration %}"
    "{{- '\\n' }}"
    "{%- else %}{{- raise_exception('a role is system, user or assistant') }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
)


def ensure_chat_template(tokenizer: Any) -> bool:
    """Give a tokenizer the default template if it has none; it is saved with the tokenizer.

    Returns:
        Whether it was given.

    Raises:
        ConfigError: it has no end-of-sequence token, which ends an answer.
    """
    if getattr(tokenizer, "chat_template", None):
        return False
    if tokenizer.eos_token is None:
        raise ConfigError(
            "the tokenizer has no eos token, with which an answer ends: set one, or a chat template"
        )
    tokenizer.chat_template = DEFAULT_TEMPLATE
    return True
