from common import MODEL, PROTOCOL, TASK, URL, read_file, write_file
from langchain.agents import create_agent


def model():
    if PROTOCOL == "anthropic":
        from langchain_anthropic import ChatAnthropic

        return ChatAnthropic(model=MODEL, base_url=URL, api_key="none", max_tokens=2000)
    from langchain_openai import ChatOpenAI

    responses = PROTOCOL == "responses"
    return ChatOpenAI(
        model=MODEL, base_url=f"{URL}/v1", api_key="none", use_responses_api=responses
    )


agent = create_agent(model(), tools=[read_file, write_file])
result = agent.invoke({"messages": [{"role": "user", "content": TASK}]})
print(result["messages"][-1].text)
