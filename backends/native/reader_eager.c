#include "reader_eager.h"

void eager_answered(struct eager *e, uint64_t now_ns)
{
    e->until_ns = 0;
    e->looks = 0;
    if (!e->credit && now_ns >= e->again_ns)
        e->credit = EAGER_TRIAL;
    if (e->credit)
        e->until_ns = now_ns + EAGER_NS;
}

bool eager_looks(struct eager *e, uint64_t now_ns)
{
    if (!e->until_ns)
        return false;
    if (now_ns < e->until_ns) {
        e->looks++;
        return true;
    }
    e->until_ns = 0;
    e->credit = e->credit > EAGER_LOSS ? e->credit - EAGER_LOSS : 0;
    if (e->credit)
        return false;
    if (e->rest_ns < EAGER_REST_NS)
        e->rest_ns = EAGER_REST_NS;
    e->again_ns = now_ns + e->rest_ns;
    if (e->rest_ns < EAGER_REST_MOST_NS)
        e->rest_ns *= 2;
    return false;
}

bool eager_found(struct eager *e)
{
    if (!e->until_ns)
        return false;
    e->until_ns = 0;
    if (e->looks > 1 && e->credit < EAGER_MOST && ++e->credit == EAGER_MOST)
        e->rest_ns = EAGER_REST_NS;
    return true;
}
