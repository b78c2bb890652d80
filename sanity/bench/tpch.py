"""Ask a TPC-H query of the Parquet files in a folder by DuckDB, or say what it has to read."""
import glob
import json
import os
import struct
import sys
import time

import duckdb

QUERIES = {
    "q6": ("""select sum(l_extendedprice * l_discount) from {t} where l_shipdate >= date '1994-01-01'
              and l_shipdate < date '1995-01-01' and l_discount between 0.05 and 0.07 and l_quantity < 24""",
           ["l_shipdate", "l_discount", "l_quantity", "l_extendedprice"]),
    "q1": ("""select l_returnflag, l_linestatus, sum(l_quantity), sum(l_extendedprice),
              sum(l_extendedprice * (1 - l_discount)), sum(l_extendedprice * (1 - l_discount) * (1 + l_tax)),
              avg(l_quantity), avg(l_extendedprice), avg(l_discount), count(*) from {t}
              where l_shipdate <= date '1998-09-02' group by all order by all""",
           ["l_returnflag", "l_linestatus", "l_quantity", "l_extendedprice", "l_discount", "l_tax", "l_shipdate"]),
}
CHUNK = 1 << 20


def run(query, folder):
    sql = query.replace("{t}", "read_parquet('%s/*.parquet')" % folder)
    duckdb.execute("set enable_progress_bar = false")  # it goes to standard output
    start = time.monotonic()
    rows = duckdb.execute(sql).fetchall()
    return {"Seconds": time.monotonic() - start, "Answer": str(rows)}


def least(columns, folder):
    """The bytes of the chunks that hold the columns' parts or a footer."""
    total = 0
    for file in sorted(glob.glob(folder + "/*.parquet")):
        size = os.path.getsize(file)
        with open(file, "rb") as f:
            f.seek(-8, os.SEEK_END)
            footer = struct.unpack("<I", f.read(4))[0]
        ranges = [(size - 8 - footer, size)]
        parts = duckdb.execute(
            "select coalesce(dictionary_page_offset, data_page_offset), total_compressed_size "
            "from parquet_metadata(?) where list_contains(?, path_in_schema)", [file, columns]).fetchall()
        ranges += [(at, at + n) for at, n in parts]
        chunks = {c for lo, hi in ranges for c in range(lo // CHUNK, (hi - 1) // CHUNK + 1)}
        total += sum(min(size, (c + 1) * CHUNK) - c * CHUNK for c in chunks)
    return {"Bytes": total}


what, name, folder = sys.argv[1:]
query, columns = QUERIES[name]
print(json.dumps(run(query, folder) if what == "run" else least(columns, folder)))
