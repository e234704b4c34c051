"""The fused modules, each a mixin before one of Hugging Face's classes. They name no family of encoders."""
