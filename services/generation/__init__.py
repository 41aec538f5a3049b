"""The generation service: prompts in, clips out, over gRPC."""
