/* A tier that is taken away while pages are on their way there, and all of them brought back.
 *
 *   withdrawals PATH [scenario] */
#include "tiered.h"

/* What withdrawing the tier does: no more demotion, then everything back. */
static int64_t withdraw(struct world *w, struct actor *a)
{
    uint64_t hand = 0, left;
    uint32_t id, serial;
    (void)a;
    ready(w->seg);
    client_of_test(w, &id, &serial);
    if (client_set_tiered(ctx_get(w->seg), id, serial, false) != TM_OK)
        return -1;
    while (tm_promote(ctx_get(w->seg), id, serial, &hand, 512) >= 0 && hand)
        ;
    return (int64_t)tm_live(ctx_get(w->seg), id, &left, 1);
}

/* Records are written; before the swap the tier is withdrawn, and perhaps another given. None goes to the first. */
static void withdrawn_while_demoted(struct world *w)
{
    uint32_t id, serial;
    client_of_test(w, &id, &serial);
    for (unsigned again = 0; again < 2; again++) {
        put(&w->pool, 1, again + 1);
        pid_t a = start(0, demote_all, 110, 0);
        at_point(0);
        expect(withdraw(w, NULL) == 0, "pages stayed in the tier");
        if (again)
            client_set_tiered(ctx_get(w->seg), id, serial, true);
        finish(0, a);
        expect(actors[0].result == 0 && !location_of(w, 1), "a page went to a tier that had been withdrawn");
        expect(holds(&w->pool, 1, again + 1), "the page is lost");
        check(w);
    }
    uint64_t hand = 0;
    uint8_t buffer[4128];
    struct tm_candidate page;
    uint32_t epoch = atomic_load(&w->seg->clients[id].tier_epoch);
    expect(tm_collect(ctx_get(w->seg), id, serial, epoch - 1, true, &hand, buffer, sizeof buffer, &page, 1) == 0,
           "a page was collected for the tier before");
    expect(tm_collect(ctx_get(w->seg), id, serial, epoch, true, &hand, buffer, sizeof buffer, &page, 1) == 1,
           "nothing was collected for the tier");
}

/* The demoter is about to swap: a withdrawal waits for it, and brings that page back too. */
static void withdrawal_waits(struct world *w)
{
    put(&w->pool, 1, 1);
    pid_t a = start(0, demote_all, 103, 0);
    at_point(0);
    pid_t b = start(1, withdraw, 105, 0);
    at_point(1);
    expect(!goes_on(1), "the withdrawal did not wait");
    finish(0, a);
    finish(1, b);
    expect(actors[1].result == 0, "%lld pages stayed in the tier", (long long)actors[1].result);
    expect(holds(&w->pool, 1, 1) && !location_of(w, 1), "the page is lost");
    check(w);
}

/* The counters of a process that was killed are put right beside a promotion, and count what it brought back. */
static int64_t recount_now(struct world *w, struct actor *a)
{
    (void)a;
    atomic_store(&w->seg->super->recount, 1);
    recount(ctx_get(w->seg));
    return atomic_load(&w->seg->super->recount);
}

static void recount_beside_a_withdrawal(struct world *w)
{
    for (uint32_t i = 1; i <= 20; i++)
        put(&w->pool, i, i);
    demote_all(w, NULL);
    expect(w->seg->pools[w->pool.pool].tier_pages > 10, "nothing was demoted");
    pid_t a = start(0, recount_now, 34, 0);
    at_point(0);
    expect(withdraw(w, NULL) == 0, "pages stayed in the tier");
    finish(0, a);
    expect(w->seg->pools[w->pool.pool].tier_pages == 0, "the recount has %lld pages in the tier",
           (long long)w->seg->pools[w->pool.pool].tier_pages);
    check(w);
}

int main(int argc, char **argv)
{
    static const struct scenario all[] = {
        {"withdrawn_while_demoted", withdrawn_while_demoted}, {"withdrawal_waits", withdrawal_waits},
        {"recount_beside_a_withdrawal", recount_beside_a_withdrawal},
    };
    shelf_make();
    prepare = ready;
    return run_scenarios(argc, argv, all, sizeof all / sizeof *all);
}
