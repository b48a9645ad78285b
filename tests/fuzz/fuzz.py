"""Long runs of random cases. python tests/fuzz/fuzz.py TARGET --cases N --seed S [--first K]

A case is decided by seed and number. What is wrong is printed, then a line of JSON per target.
`python tests/fuzz/sanitized.py` does the same with native code under ASan and UBSan.
"""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    TESTS = Path(__file__).resolve().parents[1]
    sys.path += map(str, (TESTS, *(TESTS / name for name in ("tools", "plan", "formats"))))

import fuzz_commands
import fuzz_files
import fuzz_ops
import fuzz_peers
import fuzz_plans
import torch
import watched

CASES = {
    "commands": fuzz_commands.command_case,
    "configs": fuzz_commands.config_case,
    "checkpoints": fuzz_files.checkpoint_case,
    "trajectories": fuzz_files.trajectory_case,
    "peers": fuzz_peers.case,
    "plans": fuzz_plans.case,
    "ops": fuzz_ops.case,
}

if __name__ == "__main__":
    torch.set_num_threads(1)  # no pool of threads, which a fork would lose
    fuzz_files.prepare()
    if "peers" in sys.argv[1:2]:
        fuzz_peers.peers()
    importlib.import_module("torch._dynamo")  # what some calls import at first, for ten seconds
    sys.exit(watched.main(CASES))
