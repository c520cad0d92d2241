/* The table of a test's scenarios, and running them: each in a segment of its own, of 16 MiB. */
#ifndef SCENARIOS_H
#define SCENARIOS_H

#include "interleave.h"

struct scenario {
    const char *name;
    void (*run)(struct world *w);
};

static void (*prepare)(struct tm_segment *seg); /* each new segment, if anything */

/* What main returns, for the arguments PATH [scenario]. */
static int run_scenarios(int argc, char **argv, const struct scenario *all, size_t n)
{
    unsigned ran = 0;
    if (argc < 2) {
        fprintf(stderr, "usage: %s PATH [scenario]\n", argv[0]);
        return 2;
    }
    path = argv[1];
    actors = shared_memory(sizeof *actors * ACTORS);
    for (size_t i = 0; i < n; i++) {
        struct world w = {0};
        if (argc > 2 && strcmp(argv[2], all[i].name))
            continue;
        scenario = all[i].name;
        unlink(path);
        if (tm_create(path, 16u << 20, &w.seg))
            return 2;
        open_world(&w);
        if (prepare)
            prepare(w.seg);
        int before = failures;
        all[i].run(&w);
        printf("%-22s %s\n", scenario, failures == before ? "ok" : "FAILED");
        fflush(stdout);
        tm_close(w.seg);
        unlink(path);
        ran++;
    }
    return failures || !ran;
}

#endif
