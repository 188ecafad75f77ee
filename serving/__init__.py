"""
Under serve.py:

    worker     the engine in a thread of its own: a queue, cancelling, deadlines, the news of each step
    api        OpenAI's requests and answers as data
    app        the routes: from a request over HTTP to a job of the worker, and back
    guards     who may ask: host, origin, key, the size of a body
    metrics    what is counted, as Prometheus reads it
    chat.html  the page
"""
