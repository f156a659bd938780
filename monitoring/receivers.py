"""Who is told of alerts, by name: the sinks of a configuration."""

from monitoring.outbox import Receiver
from monitoring.sinks import Sink
from monitoring.sinks.command import Command
from monitoring.sinks.json_lines import JsonLines
from monitoring.sinks.webhook import Webhook
from pipeline.config.monitoring import SinksConfig, WebhookConfig
from pipeline.records import RunFolder


def receivers_of(
    config: SinksConfig, folder: RunFolder, wandb: Sink | None = None
) -> dict[str, Receiver]:
    """Receivers by the names that the history knows their deliveries by.

    Args:
        config: the sinks.
        folder: the run, in whose folder the file of JSON lines is.
        wandb: sends an alert by Weights & Biases; None where it is disabled.
    """
    found = {}
    if config.json_lines:
        file = JsonLines(folder.monitoring / "alerts.jsonl")
        found["json_lines"] = Receiver(file, "info", keeps_all=True)
    if config.wandb and wandb is not None:
        found["wandb"] = Receiver(wandb)
    for name, webhook in config.webhooks.items():
        found[f"webhook/{name}"] = Receiver(_webhook(webhook), webhook.min_severity)
    for name, command in config.commands.items():
        program = Command(command.argv, command.timeout_seconds)
        found[f"command/{name}"] = Receiver(program, command.min_severity)
    return found


def _webhook(config: WebhookConfig) -> Webhook:
    return Webhook(
        url=config.url,
        url_env=config.url_env,
        allowed_hosts=config.hosts,
        secret_env=config.secret_env,
        allowed_networks=config.allowed_networks,
        ca_file=config.ca_file,
        timeout_seconds=config.timeout_seconds,
    )
