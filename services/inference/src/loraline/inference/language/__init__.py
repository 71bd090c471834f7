"""Which language an answer may be written in: found in questions, enforced while decoding, checked after."""
