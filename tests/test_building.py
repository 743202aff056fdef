"""Networks that several threads load at once. In a process of its own, which a fault would leave unusable."""

import subprocess
import sys

PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from prompt_diffusion.evaluation.features import build_extractor
from prompt_diffusion.model.base import load_base

sys.setswitchinterval(1e-5)


def load(index):
    base = load_base(sys.argv[1])
    return [base.unet, base.vae, base.text_encoder]


with ThreadPoolExecutor(8) as pool:
    loading = [pool.submit(load, index) for index in range(24)]
    loading.append(pool.submit(lambda: [build_extractor("efficientnet_lite0", device="cpu").network]))
    networks = [network for each in loading for network in each.result()]
devices = {str(parameter.device) for network in networks for parameter in network.parameters()}
devices.add(str(torch.nn.Linear(2, 2).weight.device))
first, second = networks[0].state_dict(), networks[3].state_dict()
print(devices, all(torch.equal(first[name], second[name]) for name in first))
"""


def test_networks_that_many_threads_load_at_once_have_their_weights(tiny_base):
    done = subprocess.run([sys.executable, "-c", PROGRAM, tiny_base], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "{'cpu'} True"
