"""The plan from start to end."""

import argparse
import re
import sys

from torch.multiprocessing.spawn import ProcessException

from moe_ops.plan import report
from moe_ops.plan.options import read_request
from moe_ops.plan.plans import make_plan


def run(options: argparse.Namespace) -> int:
    """Make the plan that the options ask for and show it. Returns the exit status: 2 for options that cannot be met."""
    try:
        if options.plot is not None:  # before any work: matplotlib may be missing
            from moe_ops.plan import plot

            plot.check_path(options.plot)
        request = read_request(options)
        plans = [make_plan(request, num_tokens) for num_tokens in request.tokens]
        report.show(report.make_console(), request, plans)
        if options.plot is not None:
            plot.draw(options.plot, request, plans)
            print(f"\nDrawn: {options.plot}")
    except (ValueError, OSError) as error:
        message = re.sub(r"^\w+: ", "", str(error))  # the name of the function that refused
        print(f"moe-ops plan: {message}", file=sys.stderr)
        return 2
    except ProcessException as error:
        print(f"moe-ops plan: rank {error.error_index} of the calibration failed: {error}", file=sys.stderr)
        return 1
    return 0
