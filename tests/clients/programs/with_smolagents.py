from common import MODEL, TASK, URL, read_file, write_file
from smolagents import OpenAIModel, ToolCallingAgent, tool

model = OpenAIModel(model_id=MODEL, api_base=f"{URL}/v1", api_key="none")
agent = ToolCallingAgent(tools=[tool(read_file), tool(write_file)], model=model, max_steps=5)
print(agent.run(TASK))
