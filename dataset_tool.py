"""Make, inspect and split data sets of lesion images; render phantoms."""

import sys

import click
from click.core import ParameterSource

from dnnlib.cli import UserError, run
from imagesets.commands import (
    convert_options,
    current_spelling,
    inspect_command,
    phantom_command,
    run_convert,
    split_command,
)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"],
                                                            "token_normalize_func": current_spelling})
@convert_options
@click.pass_context
def main(context: click.Context, **options) -> None:
    """Convert images of any kind into a data set for training, or run one of the commands below.

    \b
    python dataset_tool.py --source=images/ --labels=truth.csv --dest=isic256.zip --resolution=256x256
    python dataset_tool.py inspect isic256.zip --sheet=sheets/
    python dataset_tool.py split isic256.zip --parts=train:0.8,val:0.1,test:0.1 --seed=0
    python dataset_tool.py phantom --dest=phantom.zip --count=2000 --resolution=64x64
    """
    if context.invoked_subcommand is None:
        run_convert(**options)
        return
    for name in options:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise UserError(f"--{name.replace('_', '-')} comes before {context.invoked_subcommand}; expected the "
                            "options of a command after its name")


main.add_command(inspect_command, "inspect")
main.add_command(split_command, "split")
main.add_command(phantom_command, "phantom")

if __name__ == "__main__":
    sys.exit(run(main))
