"""Response profiles: a named way to answer, with prompt, inputs, shape, language and how it is streamed."""
