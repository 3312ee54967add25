#include "reader.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <string>
#include <system_error>
#include <utility>

namespace moert {
namespace {

using Clock = std::chrono::steady_clock;
using Lock = std::unique_lock<std::mutex>;

double seconds_between(Clock::time_point begin, Clock::time_point end) {
    return std::chrono::duration<double>(end - begin).count();
}

size_t index_of(ReadClass kind) {
    return static_cast<size_t>(kind);
}

}  // namespace

std::vector<Share> share_out(const std::vector<Part>& parts) {
    std::vector<Share> shares;
    std::vector<std::vector<Chunk>> chunks;
    for (size_t i = 0; i < parts.size(); i++) {
        const uint64_t device = parts[i].identity.device;
        const auto share =
            std::find_if(shares.begin(), shares.end(), [&](const Share& other) { return other.device == device; });
        const auto number = static_cast<size_t>(share - shares.begin());
        if (share == shares.end()) {
            shares.push_back({device, nullptr, 0});
            chunks.emplace_back();
        }
        const std::vector<Chunk> more = cut(parts[i], i);
        chunks[number].insert(chunks[number].end(), more.begin(), more.end());
    }
    for (size_t i = 0; i < shares.size(); i++) {
        shares[i].chunks = std::make_shared<const std::vector<Chunk>>(std::move(chunks[i]));
    }
    return shares;
}

uint64_t Record::nbytes_begun() const {
    uint64_t nbytes = 0;
    for (const Share& share : shares) {
        for (size_t i = 0; i < share.begun; i++) nbytes += (*share.chunks)[i].nbytes;
    }
    return nbytes;
}

Reader::Reader(Lanes lanes, std::shared_ptr<BusyClock> clock, ReadCall call)
    : call_(call), lanes_(lanes), clock_(std::move(clock)) {}

Reader::~Reader() {
    close();
}

void Reader::refuse_fork() const {
    if (in_fork()) throw ReaderError("the threads that read belong to the process that this is a fork of");
}

Reader::Disk& Reader::disk_of(uint64_t device) {
    const auto [place, made] = disks_.try_emplace(device);
    if (made) {
        place->second.device = device;
        place->second.lanes = lanes_;
    }
    return place->second;
}

bool Reader::start_thread(Disk& disk) {
    const size_t number = disk.threads.size();
    // Beside those that read there may be others that do what comes after it.
    if (number >= static_cast<size_t>(std::max(disk.lanes.all, 0) + disk.ending)) return false;
    // Threads inherit the mask: no signal handler of the program ever runs on one of these.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        disk.threads.emplace_back([this, &disk, number] {
            pthread_setname_np(pthread_self(), ("moert-disk-" + std::to_string(number)).c_str());
            work(disk);
        });
    } catch (const std::system_error&) {
        // With fewer lanes, then.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return disk.threads.size() > number;
}

// How many chunks of the disk may be begun now.
size_t Reader::beginnable(const Disk& disk) {
    const auto limit = [](int lanes, int busy) { return static_cast<size_t>(std::max(lanes - busy, 0)); };
    const size_t guesses = std::min(disk.guesses, limit(disk.lanes.guesses, disk.guessing));
    return std::min(disk.demands + guesses, limit(disk.lanes.all, disk.busy));
}

// Sees to it that there are as many threads as can begin something; how many that sleep are to be woken for it, best
// without the mutex. All at once: a disk that gets its reads one after the other gives less.
size_t Reader::sleepers(Disk& disk) {
    const size_t wanted = beginnable(disk);
    while (disk.threads.size() - static_cast<size_t>(disk.busy + disk.ending) < wanted && start_thread(disk)) {
    }
    return std::min(wanted, static_cast<size_t>(disk.idle));
}

void Reader::wake(Disk& disk, size_t count) {
    for (size_t i = 0; i < count; i++) disk.changed.notify_one();
}

void Reader::push(const std::shared_ptr<Record>& record, size_t number) {
    const Share& share = record->shares[number];
    Disk& disk = disk_of(share.device);
    disk.queues[index_of(record->kind)].push_back({record, number});
    waiting(disk, record->kind) += share.chunks->size() - share.begun;
}

std::vector<std::shared_ptr<Record>> Reader::submit(std::vector<Wanted> wanted, ReadClass kind) {
    refuse_fork();
    std::vector<std::shared_ptr<Record>> records;
    records.reserve(wanted.size());
    for (Wanted& one : wanted) {
        auto record = std::make_shared<Record>();
        record->parts = std::move(one.parts);
        record->nbytes = one.nbytes;
        record->kind = kind;
        record->after = std::move(one.after);
        record->shares = one.shares.empty() ? share_out(record->parts) : std::move(one.shares);
        for (const Share& share : record->shares) record->unfinished += share.chunks->size();
        records.push_back(std::move(record));
    }
    std::vector<std::pair<Disk*, size_t>> disks;  // and how many threads to wake
    {
        const Lock lock(mutex_);
        if (closing_) throw ReaderError("the reader is closed");
        for (const auto& record : records) {
            if (record->shares.empty()) record->outcome.settle(ReadState::kWhole);
            for (size_t i = 0; i < record->shares.size(); i++) {
                push(record, i);
                Disk* disk = &disk_of(record->shares[i].device);
                const auto known = [&](const std::pair<Disk*, size_t>& other) { return other.first == disk; };
                if (std::none_of(disks.begin(), disks.end(), known)) disks.push_back({disk, 0});
            }
        }
        for (auto& [disk, count] : disks) {
            count = sleepers(*disk);
            if (disk->threads.empty() && disk->lanes.all > 0) {
                // Nothing has been begun: that takes the mutex.
                for (const auto& record : records) withdraw(*record);
                throw ReaderError("the system gives no thread to read with");
            }
        }
    }
    for (const auto& [disk, count] : disks) wake(*disk, count);
    return records;
}

std::shared_ptr<Record> Reader::submit(std::vector<Part> parts, uint64_t record_bytes, ReadClass kind,
                                       AfterRead after) {
    std::vector<Wanted> wanted;
    wanted.push_back({std::move(parts), {}, record_bytes, std::move(after)});
    return submit(std::move(wanted), kind).front();
}

// Takes what has not been begun off the queues, and returns how many chunks that were.
size_t Reader::withdraw(Record& record) {
    size_t chunks = 0;
    for (Share& share : record.shares) {
        if (share.begun == share.chunks->size()) continue;
        Disk& disk = disk_of(share.device);
        auto& queue = disk.queues[index_of(record.kind)];
        const auto place = std::find_if(queue.begin(), queue.end(),
                                        [&](const Queued& queued) { return queued.record.get() == &record; });
        if (place == queue.end()) continue;
        queue.erase(place);
        waiting(disk, record.kind) -= share.chunks->size() - share.begun;
        chunks += share.chunks->size() - share.begun;
    }
    return chunks;
}

bool Reader::cancel(const std::shared_ptr<Record>& record) {
    refuse_fork();
    const Lock lock(mutex_);
    if (record->outcome.state() != ReadState::kUnderWay || record->begun) return false;
    withdraw(*record);
    record->outcome.settle(ReadState::kCancelled);
    return true;
}

bool Reader::give_up(const std::shared_ptr<Record>& record) {
    refuse_fork();
    const Lock lock(mutex_);
    // The thread that ends a record writes to it without the mutex.
    if (record->outcome.state() != ReadState::kUnderWay || record->unfinished == 0 || record->failed) return false;
    const size_t chunks = withdraw(*record);
    if (chunks == 0) return false;
    record->unfinished -= chunks;
    record->given_up = true;
    if (record->unfinished == 0) record->outcome.settle(ReadState::kCancelled);
    return true;
}

bool Reader::promote(const std::shared_ptr<Record>& record, ReadClass kind) {
    refuse_fork();
    const Lock lock(mutex_);
    if (closing_) return false;
    if (record->given_up) {
        if (record->unfinished == 0 || record->failed) return false;
        record->given_up = false;
        for (const Share& share : record->shares) record->unfinished += share.chunks->size() - share.begun;
    } else if (record->kind <= kind || withdraw(*record) == 0) {
        return false;
    }
    record->kind = kind;
    for (size_t i = 0; i < record->shares.size(); i++) {
        const Share& share = record->shares[i];
        if (share.begun == share.chunks->size()) continue;
        push(record, i);
        Disk& disk = disk_of(share.device);
        wake(disk, sleepers(disk));
    }
    return true;
}

void Reader::set_lanes(uint64_t device, Lanes lanes) {
    refuse_fork();
    const Lock lock(mutex_);
    if (closing_) return;
    Disk& disk = disk_of(device);
    const auto now = Clock::now();
    enter(disk, 0, now);
    disk.lanes = lanes;
    disk.saturated_since = now;
    disk.counted_from_s = disk.saturated_s;
    disk.saturated_bytes = 0;
    wake(disk, sleepers(disk));
}

std::vector<Saturation> Reader::saturation(double seconds, double nbytes) {
    refuse_fork();
    const Lock lock(mutex_);
    std::vector<Saturation> found;
    for (auto& [device, disk] : disks_) {
        const double counted_s = disk.saturated_s - disk.counted_from_s;
        if (counted_s < seconds || disk.saturated_bytes < nbytes) continue;
        found.push_back({device, disk.lanes.all, disk.saturated_bytes, counted_s});
        disk.counted_from_s = disk.saturated_s;
        disk.saturated_bytes = 0;
    }
    return found;
}

// Brings the saturated time up to now, and only then changes how many lanes are busy.
void Reader::enter(Disk& disk, int change, Clock::time_point now) {
    if (disk.busy >= disk.lanes.all) disk.saturated_s += seconds_between(disk.saturated_since, now);
    disk.saturated_since = now;
    disk.busy += change;
}

bool Reader::take(Disk& disk, Taken* taken) {
    if (disk.busy >= disk.lanes.all) return false;
    for (int kind = 0; kind < kReadClasses; kind++) {
        const bool guess = kind != static_cast<int>(ReadClass::kDemand);
        if (guess && disk.guessing >= disk.lanes.guesses) return false;
        auto& queue = disk.queues[static_cast<size_t>(kind)];
        if (queue.empty()) continue;
        const Queued& next = queue.front();
        Share& share = next.record->shares[next.share];
        *taken = {next.record, &(*share.chunks)[share.begun], guess, 0, Clock::now()};
        waiting(disk, taken->record->kind)--;
        if (++share.begun == share.chunks->size()) queue.pop_front();
        if (!std::exchange(taken->record->begun, true)) taken->record->began = taken->began;
        clock_->enter();
        enter(disk, 1, taken->began);
        taken->saturated_s = disk.saturated_s;
        disk.guessing += guess;
        return true;
    }
    return false;
}

void Reader::put_back(Disk& disk, const Taken& taken) {
    const auto now = Clock::now();
    enter(disk, -1, now);
    disk.guessing -= taken.guess;
    clock_->leave();
    // Of a chunk that was read partly at other times its share.
    const double saturated_s = disk.saturated_s - std::max(taken.saturated_s, disk.counted_from_s);
    const double took_s = seconds_between(taken.began, now);
    if (saturated_s > 0) disk.saturated_bytes += static_cast<double>(taken.chunk->nbytes) * saturated_s / took_s;
    taken.record->seconds = seconds_between(taken.record->began, now);
}

void Reader::work(Disk& disk) {
    Lock lock(mutex_);
    for (;;) {
        Taken taken;
        if (!take(disk, &taken)) {
            if (closing_) return;
            disk.idle++;
            disk.changed.wait(lock);
            disk.idle--;
            continue;
        }
        lock.unlock();
        Failure failure{};
        const bool whole = read_chunk(call_, *taken.chunk, taken.record->parts[taken.chunk->part], &failure);
        lock.lock();
        put_back(disk, taken);
        Record& record = *taken.record;
        record.unfinished--;
        if (!whole && !std::exchange(record.failed, true)) {
            record.failure = failure;
            record.unfinished -= withdraw(record);
        }
        if (record.unfinished == 0) {
            const bool takes_time = record.after != nullptr;
            disk.ending += takes_time;
            // Threads that are being joined start no others.
            if (takes_time && !closing_) wake(disk, sleepers(disk));
            lock.unlock();
            end_record(record);
            taken.record.reset();
            lock.lock();
            disk.ending -= takes_time;
        }
    }
}

// Without the mutex: nobody else touches the record by now.
void Reader::end_record(Record& record) {
    if (record.given_up) {
        record.outcome.settle(ReadState::kCancelled);
        return;
    }
    if (!record.failed) record.failed = !unchanged(record.parts, &record.failure);
    if (!record.failed) {
        if (record.after != nullptr) record.after();
        records_.fetch_add(1);
        bytes_read_.fetch_add(record.nbytes);
    }
    record.outcome.settle(record.failed ? ReadState::kFailed : ReadState::kWhole);
}

void Reader::shut_down() {
    if (in_fork()) return;
    const Lock lock(mutex_);
    closing_ = true;
    for (auto& [device, disk] : disks_) {
        for (auto& queue : disk.queues) {
            const std::deque<Queued> queued = queue;
            for (const Queued& next : queued) {
                if (next.record->begun || next.record->outcome.state() != ReadState::kUnderWay) continue;
                withdraw(*next.record);
                next.record->outcome.settle(ReadState::kClosed);
            }
        }
        disk.changed.notify_all();
    }
}

void Reader::close() {
    if (in_fork()) return;
    shut_down();
    const Lock joining(joining_);
    for (auto& [device, disk] : disks_) {
        for (std::thread& thread : disk.threads) {
            if (thread.joinable()) thread.join();
        }
    }
}

}  // namespace moert
