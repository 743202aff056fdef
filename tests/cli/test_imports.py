"""The command line starts fast only while importing it loads nothing heavy."""

import subprocess
import sys


def test_the_command_line_loads_neither_torch_nor_gradio():
    code = "import sys; import prompt_diffusion.cli; sys.exit(len({'torch', 'gradio', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
