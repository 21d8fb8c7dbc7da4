from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from common import MODEL, PROTOCOL, TASK, URL, read_file, write_file
from openai import AsyncOpenAI

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none")
kind = OpenAIResponsesModel if PROTOCOL == "responses" else OpenAIChatCompletionsModel
agent = Agent(
    name="copier",
    model=kind(model=MODEL, openai_client=client),
    tools=[function_tool(read_file), function_tool(write_file)],
)
print(Runner.run_sync(agent, TASK).final_output)
