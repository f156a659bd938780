"""What a task asks of the data section, and what it cannot use."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.schema import DataConfig, RunConfig

ALWAYS_CONVERSATIONS = ("image-text-to-text",)
"""Tasks whose rows are conversations, or prompts with their completions."""


def conversation_problems(task: str, data: "DataConfig") -> list[str]:
    """Conversations are for some tasks, which may need them; in all sets of a run or in none."""
    problems = []
    if task in ALWAYS_CONVERSATIONS and not data.is_conversation:
        problems.append(
            f"{task} needs data.messages_column_name, or data.prompt_column_name and "
            "completion_column_name"
        )
    if data.is_conversation and task not in (*ALWAYS_CONVERSATIONS, "text-generation"):
        problems.append(f"data.messages_column_name and prompt_column_name: {task} reads none")
    if data.chat_template is not None and not data.is_conversation:
        problems.append("data.chat_template needs messages_column_name or prompt_column_name")
    for name, source in data.ood.items():
        if source.is_conversation != data.is_conversation:
            problems.append(
                f"data.ood.{name}: its rows are conversations if those of the run are; name its "
                "messages_column_name, or prompt_column_name and completion_column_name"
            )
    return problems


def memorisation_problems(config: "RunConfig") -> list[str]:
    """Canaries and their probe are for text-generation, and fit in its samples."""
    problems = []
    canaries, probe = config.data.canaries, config.evaluation.memorisation
    task, longest = config.model.task, config.data.max_length
    if task != "text-generation" and canaries is not None:
        problems.append(f"data.canaries: of text-generation, not {task}")
    if task != "text-generation" and probe is not None:
        problems.append(f"evaluation.memorisation: of text-generation, not {task}")
    if canaries is not None and canaries.num_tokens > longest:
        problems.append(f"data.canaries.num_tokens is above data.max_length ({longest})")
    if probe is not None and probe.prompt_tokens + probe.k > longest:
        problems.append(
            f"evaluation.memorisation: prompt_tokens + k is above data.max_length ({longest})"
        )
    return problems
