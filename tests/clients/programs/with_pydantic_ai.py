from common import MODEL, PROTOCOL, TASK, URL, read_file, write_file
from pydantic_ai import Agent


def model():
    if PROTOCOL == "anthropic":
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        return AnthropicModel(MODEL, provider=AnthropicProvider(api_key="none", base_url=URL))
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
    kind = OpenAIResponsesModel if PROTOCOL == "responses" else OpenAIChatModel
    return kind(MODEL, provider=provider)


print(Agent(model(), tools=[read_file, write_file]).run_sync(TASK).output)
