"""Prompt formats as chat templates, so that a model is asked as it was trained by whoever loads its processor."""

from typing import Any

from routing_experts.data.prompts import WRITTEN, gap_behind_images, image_token


def chat_template_of(processor: Any, prompt_format: str) -> str:
    """A Jinja template that renders messages as a written format does.

    Pictures stand before their question's text, each with a line break behind it, as in LLaVA's data. A question is
    always followed by the opening of its answer, whether one is asked for or not; every answer ends as those do that
    are followed by a question.

    Args:
        processor: whose tokens it is for.
        prompt_format: one of ``data.prompts.WRITTEN``.
    """
    layout = WRITTEN[prompt_format]
    closes = processor.tokenizer.eos_token if layout.closes is None else layout.closes
    again = layout.asks if layout.asks_again is None else layout.asks_again
    picture = f"{image_token(processor)}{gap_behind_images(processor)}\n"
    said = (
        "{%- macro said(content) -%}{% if content is string %}{{ content }}{% else %}"
        "{% for part in content if part.type not in ('image', 'text') %}"
        "{{ raise_exception('a part of type ' ~ part.type ~ ': the model takes image and text') }}{% endfor %}"
        f"{{% for part in content if part.type == 'image' %}}{{{{ {picture!r} }}}}{{% endfor %}}"
        "{% for part in content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}{%- endmacro -%}"
    )
    named = f"said(messages[0].content) if messages[0].role == 'system' else {layout.system!r}"
    system = f"{{{{ {layout.before_system!r} ~ ({named}) ~ {layout.after_system!r} }}}}"
    first = "loop.first or loop.previtem.role == 'system'"
    asked = f"{{{{ ({layout.asks!r} if {first} else {again!r}) ~ said(message.content) ~ {layout.answers!r} }}}}"
    answered = f"{{{{ {layout.gap!r} ~ said(message.content) ~ {closes!r} }}}}"
    return (
        f"{said}{system}{{% for message in messages %}}"
        f"{{% if message.role == 'user' %}}{asked}{{% elif message.role == 'assistant' %}}{answered}"
        "{% elif message.role != 'system' or not loop.first %}"
        "{{ raise_exception('a message from ' ~ message.role ~ ': user and assistant speak, "
        "behind a system prompt if there is one') }}"
        "{% endif %}{% endfor %}"
    )
