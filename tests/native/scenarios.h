/* The table of a test's scenarios, and running them: each in a segment of its own, of 16 MiB. */
#ifndef SCENARIOS_H
#define SCENARIOS_H

#include "interleave.h"

/* Register as a thread, wait at point 99, and stop at that point then. */
static inline void wait_first(struct world *w, struct actor *a, uint32_t point)
{
    uint8_t page[TM_PAGE];
    tm_get(&w->pool, oid, 9, page, 1);
    kill_point(99);
    atomic_store(&a->point, point);
    atomic_store(&a->reached, 0);
    atomic_store(&a->go, 0);
}

/* Let an actor that is in wait_first go on to its next point. */
static inline void go_on(int i)
{
    atomic_store(&actors[i].go, 1);
    while (atomic_load(&actors[i].go))
        nap();
    at_point(i);
}

/* Let actor `i` go on, who may have to wait for another one: does it come to its end? */
static inline bool goes_on(int i)
{
    atomic_store(&actors[i].go, 1);
    return gets_to(i, &actors[i].finished);
}

/* Let the second of two actors go on, which may have to wait for the first one, and then that one. */
static inline void let_second_go_first(struct world *w, pid_t first, pid_t second)
{
    goes_on(2);
    finish(0, first);
    finish(2, second);
    check(w);
}

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
