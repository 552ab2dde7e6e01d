def write(folder, network, histories):
    import json
    for n, h in histories.items():
        r=h[-1]
        m=lambda d: round(sum(v[0] for v in d.values())/len(d),1)
        print(n, "acc", r["test_accuracy"], "best", max(x["test_accuracy"][0] for x in h), "loss", round(r["probe_loss"][0],3), {k:m(v) for k,v in r["rank"].items()}, "s", round(sum(x["seconds"] for x in h),1))
    return folder
