"""
Under serve.py:

    bodies     what a request's body may say
    api        OpenAI's requests as data: from a body to prompts for the engine
    answers    OpenAI's answers as data, whole or in chunks
    worker     the engine in a thread of its own, with a bounded queue
    guards     what every request passes first: hosts, origins, the API key, the size of a body
    metrics    what is counted, for Prometheus
    documents  openapi.json, and what a browser may do with the page
    app        the routes
    server     the process: its socket, signals and end
    chat.html  the page
"""
