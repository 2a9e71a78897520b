"""The prototype layer against its textbook form: time and extra memory, forward and backward.

The textbook form writes the distances to all patches out as convolutions, ||z||^2 - 2 z.p +
||p||^2, clips them at 0 and takes the minimum by max-pooling, as most implementations of ProtoPNet
do; automatic differentiation keeps what it needs. It is given the sum ||z||^2 in its cheap form,
once for all prototypes.

Times are medians of runs that alternate between the forms in one process. Memory is the peak of the
resident set during one step, beyond what the process held before it, each form in a fresh process
of its own (Linux only: VmHWM of /proc/self/status). Run it on a machine that does nothing else:
where threads must wait for a processor, each of many short operations waits anew.

    python examples/benchmarks/layer.py
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from measuring import alternate, extra_memory, in_fresh_process

from protoclf.prototype_layer import min_distances

TIME_GOALS = {7: 3, 14: 6, 28: 6}  # times as fast, for m = 2000, D = 128, batch 80
MEMORY_GOAL = 1 / 8


def main():
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(memory_here(FORMS[arguments.memory_of], arguments, arguments.sides[0]))
        return
    sizes = f"m={arguments.prototypes} D={arguments.channels} batch={arguments.batch}"
    print(f"{sizes} threads={torch.get_num_threads()}")
    print("cells    textbook      ours   speed-up   extra memory: textbook      ours   ratio")
    results = {side: compare(side, arguments) for side in arguments.sides}
    if arguments.check:
        check(results)


def compare(side, arguments):
    memory = {name: memory_of(name, side, arguments) for name in FORMS}
    assert_equal(*make_inputs(arguments, side))
    inputs = make_inputs(arguments, side)
    work = {name: partial(step, form, *inputs) for name, form in FORMS.items()}
    seconds = alternate(work, arguments.rounds)
    speed_up = seconds["textbook"] / seconds["ours"]
    memory_ratio = memory["ours"] / memory["textbook"]
    print(
        f"{side:2d}x{side:<2d}  {seconds['textbook']:8.3f} s {seconds['ours']:7.3f} s"
        f" {speed_up:9.1f}x {memory['textbook']:22.1f} MB {memory['ours']:6.1f} MB"
        f" {memory_ratio:7.3f}",
        flush=True,
    )
    return speed_up, memory_ratio


def check(results):
    for side, (speed_up, memory_ratio) in results.items():
        assert speed_up >= TIME_GOALS.get(side, 1), f"{side}: {speed_up:.1f}x"
        assert memory_ratio <= MEMORY_GOAL, f"{side}: {memory_ratio:.3f} of the memory"


def textbook(z, p):
    squares = F.conv2d(z.square(), torch.ones_like(p[:1]))  # (N, 1, H', W')
    p_squares = p.square().sum(dim=(1, 2, 3))[:, None, None]  # (m, 1, 1)
    distance = F.relu(squares + (p_squares - 2 * F.conv2d(z, p)))  # (N, m, H', W')
    return -F.max_pool2d(-distance, distance.shape[2:]).flatten(1)  # (N, m)


def ours(z, p):
    return min_distances(z, p)[0]  # (N, m)


FORMS = {"textbook": textbook, "ours": ours}


def step(form, z, p):
    """Forward and backward through the similarity, so that the gradients differ everywhere."""
    distance = form(z, p)
    loss = torch.log((distance + 1) / (distance + 1e-4)).mean()
    return torch.autograd.grad(loss, (z, p))


def make_inputs(arguments, side):
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(arguments.batch, arguments.channels, side, side, generator=generator)
    p = torch.rand(arguments.prototypes, arguments.channels, 1, 1, generator=generator)
    return z.requires_grad_(), p.requires_grad_()


def assert_equal(z, p):
    torch.testing.assert_close(ours(z[:8], p), textbook(z[:8], p), rtol=1e-4, atol=1e-4)


def memory_of(name, side, arguments):
    """Extra memory of one step, in a process of its own, in MB."""
    options = ["--memory-of", name, "--sides", side]
    for option in ("prototypes", "channels", "batch", "threads"):
        if getattr(arguments, option):
            options += [f"--{option}", getattr(arguments, option)]
    return in_fresh_process(__file__, *options)


def memory_here(form, arguments, side):
    """Peak of one step beyond inputs and the code that a small step before it loads, in MB."""
    z, p = inputs = make_inputs(arguments, side)
    step(form, z[:2, :, :7, :7].detach().requires_grad_(), p)
    return extra_memory(lambda: step(form, *inputs))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prototypes", type=int, default=2000)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--batch", type=int, default=80)
    parser.add_argument("--sides", type=int, nargs="+", default=[7, 14, 28])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--check", action="store_true", help="fail where a goal is missed")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for correctness only")
    parser.add_argument("--memory-of", choices=list(FORMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        if arguments.check:
            parser.error("--check holds the full sizes to their goals: leave --quick out.")
        arguments.prototypes, arguments.channels, arguments.batch = 50, 16, 4
        arguments.sides, arguments.rounds = [7], 1
    return arguments


if __name__ == "__main__":
    main()
