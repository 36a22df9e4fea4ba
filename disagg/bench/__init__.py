"""The load generator behind `disagg bench serve`, for any OpenAI-compatible endpoint.

cli        flags                                     serve      flags -> workload -> run -> report
discovery  what the endpoint says of itself          prompts    lengths and prefix ids -> request bodies
runner     when to send: open or closed loop         client     one request -> one RequestResult
http       HTTP/1.1 at little cost                   stream     is the stream whole, when came its tokens
report     what each figure means; table and JSON    failures   what can go wrong
"""
