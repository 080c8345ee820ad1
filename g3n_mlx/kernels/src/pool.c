// Where PyTorch brings an OpenMP, its threads are taken (pool_share): two sets of threads that spin for work keep each
// other from the cores. Elsewhere the team has threads of its own. These wait for their next region by spinning for a tenth of a millisecond, the gap between two calls of a decode
// step, and sleep after that. Barriers spin too, and give way to other processes when one takes long.

#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LOOPS 64  // in one region, at most
#define SPINS_BEFORE_YIELD 4000
#define NANOSECONDS_BEFORE_SLEEP 100000

struct Team {
    int threads;
    Region region;
    void *argument;
    atomic_uint generation;  // of the region that runs or ran last
    atomic_int inside;       // workers that have not left it
    atomic_int sleeping;
    int ended;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    struct {
        _Alignas(64) atomic_long next;
        _Alignas(64) atomic_int arrived;
    } loops[LOOPS];
    pthread_t *workers;
};

static Team *team;
static int wanted = 1;
static OpenMP shared;
static pthread_mutex_t calls = PTHREAD_MUTEX_INITIALIZER;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

// Between two looks at what another thread will change.
static inline void give_way(int spins) {
    if (spins < SPINS_BEFORE_YIELD) pause_briefly();
    else sched_yield();
}

static long long nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

long next_item(Place *place) {
    return atomic_fetch_add_explicit(&place->team->loops[place->phase].next, 1, memory_order_relaxed);
}

void end_loop(Place *place) {
    atomic_int *arrived = &place->team->loops[place->phase++].arrived;
    if (place->threads == 1) return;
    atomic_fetch_add_explicit(arrived, 1, memory_order_acq_rel);
    for (int spins = 0; atomic_load_explicit(arrived, memory_order_acquire) < place->threads; spins++) give_way(spins);
}

static void take_part(Team *t, int thread) {
    Place place = {t, thread, t->threads, 0};
    t->region(&place, t->argument);
}

// The same on a thread of OpenMP's.
static void take_shared_part(void *argument) {
    Team *t = argument;
    Place place = {t, shared.thread(), shared.threads(), 0};
    t->region(&place, t->argument);
}

// Waits for a generation after `seen`; the new one.
static unsigned wait_for_region(Team *t, unsigned seen) {
    long long until = 0;
    for (int spins = 1;; spins++) {
        unsigned generation = atomic_load_explicit(&t->generation, memory_order_acquire);
        if (generation != seen) return generation;
        pause_briefly();
        if (spins % 64) continue;
        long long now = nanoseconds();
        if (!until) until = now + NANOSECONDS_BEFORE_SLEEP;
        if (now < until) continue;
        pthread_mutex_lock(&t->mutex);
        atomic_fetch_add(&t->sleeping, 1);
        while (atomic_load(&t->generation) == seen) pthread_cond_wait(&t->wake, &t->mutex);
        atomic_fetch_sub(&t->sleeping, 1);
        pthread_mutex_unlock(&t->mutex);
    }
}

typedef struct {
    Team *team;
    int thread;
} Worker;

static void *work(void *argument) {
    Worker worker = *(Worker *)argument;
    free(argument);
    for (unsigned seen = 0;;) {
        seen = wait_for_region(worker.team, seen);
        if (worker.team->ended) return NULL;
        take_part(worker.team, worker.thread);
        atomic_fetch_sub_explicit(&worker.team->inside, 1, memory_order_release);
    }
}

static void start_region(Team *t) {
    atomic_store(&t->inside, t->threads - 1);
    atomic_fetch_add(&t->generation, 1);
    if (atomic_load(&t->sleeping)) {
        pthread_mutex_lock(&t->mutex);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->mutex);
    }
}

static void end_team(Team *t) {
    t->ended = 1;
    start_region(t);
    for (int i = 0; i < t->threads - 1; i++) pthread_join(t->workers[i], NULL);
    pthread_mutex_destroy(&t->mutex);
    pthread_cond_destroy(&t->wake);
    free(t->workers);
    free(t);
}

// A team of as many threads as can be had, the caller's own among them.
static Team *new_team(int threads) {
    Team *t = aligned_alloc(64, sizeof *t);  // whole cache lines, since its loops are aligned to them
    if (!t) abort();
    memset(t, 0, sizeof *t);
    t->threads = 1;
    t->workers = calloc(threads, sizeof *t->workers);
    pthread_mutex_init(&t->mutex, NULL);
    pthread_cond_init(&t->wake, NULL);
    for (int i = 1; i < threads && t->workers; i++) {
        Worker *worker = malloc(sizeof *worker);
        if (!worker) break;
        *worker = (Worker){t, i};
        if (pthread_create(&t->workers[i - 1], NULL, work, worker)) {
            free(worker);
            break;
        }
        t->threads++;
    }
    return t;
}

// A forked child has none of the threads, OpenMP's neither: it starts a team of its own.
static void forget_team(void) {
    team = NULL;
    memset(&shared, 0, sizeof shared);
    pthread_mutex_init(&calls, NULL);
}

void pool_threads(int count) { wanted = count < 1 ? 1 : count; }

void pool_share(const OpenMP *openmp) { shared = *openmp; }

void pool_run(Region region, void *argument) {
    static int registered;
    pthread_mutex_lock(&calls);
    if (!registered) registered = !pthread_atfork(NULL, NULL, forget_team);
    if (!team || (team->threads != wanted && !shared.parallel)) {
        if (team) end_team(team);
        team = new_team(shared.parallel ? 1 : wanted);
        if (!shared.parallel) wanted = team->threads;
    }
    team->region = region;
    team->argument = argument;
    for (int i = 0; i < LOOPS; i++) {
        atomic_store_explicit(&team->loops[i].next, 0, memory_order_relaxed);
        atomic_store_explicit(&team->loops[i].arrived, 0, memory_order_relaxed);
    }
    if (shared.parallel) {
        shared.parallel(take_shared_part, team, (unsigned)wanted, 0);
        pthread_mutex_unlock(&calls);
        return;
    }
    start_region(team);
    take_part(team, 0);
    for (int spins = 0; atomic_load_explicit(&team->inside, memory_order_acquire); spins++) give_way(spins);
    pthread_mutex_unlock(&calls);
}
