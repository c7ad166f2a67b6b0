"""The commands of study.py: their flags, and what they print."""

import click

GROUP_HELP = """Test what synthetic images are worth.

\b
python study.py protocol --train=isic-train.zip --val=isic-val.zip --test=isic-test.zip --positive=mel \\
    --out=protocol.json
python study.py classify --protocol=protocol.json --synthetic=synthetic.zip --outdir=classifiers
python study.py predict --model=classifiers/models/real-seed0.safetensors --data=images.zip --out=probabilities.csv
"""
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def make_group() -> click.Group:
    """Return the command line of study.py."""
    commands: list[click.Command] = []  # each command is registered here
    return click.Group("study", commands=commands, help=GROUP_HELP, context_settings=_CONTEXT,
                       no_args_is_help=False)  # which is no one line
