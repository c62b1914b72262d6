"""The way of one range of ids, without Dagster: rows in, verified points out, every row marked.

    open_range     settings fixed, catalog and stores open, the plan says what is to be done with each row
    decode_range   pending rows      ->  frame shards        the rows are marked as extracted
    embed_range    frame shards      ->  embedding shards    the ledger notes them as embedded
    index_range    embedding shards  ->  points in Qdrant    the rows are marked as embedded: they are done

A notebook can do what a run does. Each step opens the range again, and so sees what the step before it has marked:

    settings, id_range = load_settings(), IdRange.parse("1-1000")
    with open_range(settings, id_range, begins=True) as work:
        print(decode_range(work).numbers)
    with open_range(settings, id_range) as work:
        print(embed_range(work).numbers)
    with open_range(settings, id_range) as work:
        print(index_range(work).numbers)
"""
