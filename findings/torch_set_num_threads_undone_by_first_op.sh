#!/usr/bin/env bash
# torch.set_num_threads in a fresh thread lasts until that thread's first parallel operation, if another thread sets the
# number in between: the operation takes over the number that was set last anywhere. A call of get_num_threads before
# set_num_threads makes the thread's number stay. Threads that start later have the number that was set last anywhere,
# not their creator's.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_environment torch==2.13.0 numpy==2.4.2

cat >"$folder/probe.py" <<'PYTHON'
import sys
import threading

import torch


def in_thread(function, *arguments):
    result = []
    thread = threading.Thread(target=lambda: result.append(function(*arguments)))
    thread.start()
    thread.join()
    return result[0]


def after_first_op(ask_first, others):
    """The thread's number behind its first operation, where it set 1 and then another thread set `others`."""
    if ask_first:
        torch.get_num_threads()
    torch.set_num_threads(1)
    if others:
        in_thread(torch.set_num_threads, others)
    torch.ones(1 << 20) + 1
    return torch.get_num_threads()


status = 0
torch.get_num_threads()
torch.set_num_threads(2)
for ask_first, others, found in [(False, None, 1), (False, 3, 3), (True, 3, 1)]:
    got = in_thread(after_first_op, ask_first, others)
    print(
        f"{'asked, ' if ask_first else ''}set to 1{f', another thread sets {others}' if others else ''}:"
        f" {got} after the first operation"
    )
    status |= got != found
in_thread(torch.set_num_threads, 5)
creator, new = torch.get_num_threads(), in_thread(torch.get_num_threads)
print(f"main thread {creator}; a thread that it starts after another thread has set 5: {new}")
sys.exit(status or (creator, new) != (2, 5))
PYTHON

status=0
"$python" "$folder/probe.py" || status=1
[ "$status" = 0 ] && echo "as found: a thread's own number counts if it was asked for before, or nobody else sets one"
exit "$status"
