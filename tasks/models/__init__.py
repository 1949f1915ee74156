"""Models as folders in Hugging Face's layout: loading, arithmetic, chat templates, logits, and how an answer is judged.

May import `frame`.
"""
