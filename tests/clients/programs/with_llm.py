import os
from pathlib import Path

from common import MODEL, TASK, URL, read_file, write_file

folder = Path(os.environ["LLM_USER_PATH"])
folder.mkdir(exist_ok=True)
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: {MODEL}\n  model_name: {MODEL}\n  api_base: {URL}/v1\n  api_key_name: none\n"
    "  supports_tools: true\n"
)

import llm  # noqa: E402  (it reads the file above)

chain = llm.get_model(MODEL).chain(TASK, tools=[read_file, write_file], key="none")
print(chain.text())
