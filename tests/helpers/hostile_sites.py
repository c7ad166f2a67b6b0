"""A site whose program was changed: its own filter is off, and each of its rounds sends something else."""

import torch

ROUNDS = ("not finite", "hundredfold", "extra tensor", "another shape", "JSON", "oversized", "nothing")


def become_hostile() -> None:
    """Change the site's program in this process, a job of it."""
    import safetensors.torch

    from federated.deployment import executor
    from federated.site import Site
    from tests.helpers.federated_states import forged

    train, sent = Site.train_round, []

    def attack(site, data):
        update, kind = train(site, data), ROUNDS[len(sent)]
        sent.append(kind)
        tensors = safetensors.torch.load(update)
        name = next(each for each in tensors if each.startswith("G.") and tensors[each].numel() > 10)
        return {"not finite": lambda: forged(update, tensors={name: tensors[name] * torch.nan}),
                "hundredfold": lambda: forged(update, tensors={key: 100 * value for key, value in tensors.items()}),
                "extra tensor": lambda: forged(update, tensors={"G.extra": torch.zeros(1)}),
                "another shape": lambda: forged(update, tensors={name: torch.zeros(3)}),
                "JSON": lambda: b'{"patient": "Ann"}', "oversized": lambda: update + bytes(2**24),
                "nothing": lambda: None}[kind]()

    Site.train_round = attack
    executor.OutgoingFilter.process = lambda self, shareable, fl_ctx: shareable
